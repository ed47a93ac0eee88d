"""`python -m loopserve` is `loopserve`."""

from loopserve.cli import main

if __name__ == "__main__":
    main()
