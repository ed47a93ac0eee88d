"""The live page: what the fleet does now and did in the last minutes, and a box to talk to it. See `loopserve observe`."""
