"""A program that is a Ray head with its dashboard on loopback, as KubeRay's operator would find one, until its input ends.

Prints the dashboard's address. What the manifests put into the environment of a node is in this program's own.
"""

import sys
import tempfile

import ray

if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="ls-", dir="/tmp") as folder:  # sockets allow 107 characters
        context = ray.init(
            address="local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=int(sys.argv[1]),
            num_cpus=8,
            num_gpus=0,
            resources={"loopserve_engine": 1000, "loopserve_front": 1000},
            object_store_memory=200 << 20,
            log_to_driver=False,
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
        )
        print(context.dashboard_url, flush=True)
        sys.stdin.read()
        ray.shutdown()
