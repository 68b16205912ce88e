"""One process of a run of several: python process_of_run.py WORKDIR PORT COUNT ID FIELDS STOP SEED.

FIELDS: of the tiny configuration, as JSON. STOP: after so many questions this process, and none of
the others, asks for a stop; -1: never. SEED: of this process's data.
"""

import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import tiny  # noqa: E402  (the flags above must be set before jax starts)

from jaxcifar import data, parallel, train  # noqa: E402
from jaxcifar.errors import UserError  # noqa: E402


def main(workdir, port, num_processes, process_id, fields, stop_after, seed):
    """Join the other processes and train on all devices; return the exit code."""
    left = int(stop_after)

    def stop():
        nonlocal left
        left -= 1
        return 15 if left == -1 else 0

    parallel.join(f"127.0.0.1:{port}", int(num_processes), int(process_id))
    data.load = lambda name, data_dir: tiny.tiny_dataset(seed=int(seed))
    config = tiny.tiny_config(num_devices=0, **json.loads(fields))
    try:
        train.fit(config, workdir, stop=stop if int(stop_after) >= 0 else lambda: 0)
    except train.Interrupted as error:
        return 128 + error.signum
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
