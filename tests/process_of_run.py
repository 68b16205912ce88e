"""One process of a run of several: python process_of_run.py WORKDIR KIND PORT COUNT ID."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import tiny  # noqa: E402  (the flags above must be set before jax starts)

from jaxcifar import data, parallel, train  # noqa: E402


def main(workdir, kind, port, num_processes, process_id):
    """Join the other processes and train the tiny configuration on all devices."""
    parallel.join(f"127.0.0.1:{port}", int(num_processes), int(process_id))
    data.load = lambda name, data_dir: tiny.tiny_dataset()
    train.fit(tiny.tiny_config(num_devices=0, parallel=kind), workdir)


if __name__ == "__main__":
    main(*sys.argv[1:])
