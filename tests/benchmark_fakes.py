"""What a benchmark's contender measures and reports, for the tests."""


def measured(images, seconds, cpu_seconds):
    return {"images": images, "seconds": seconds, "cpu_seconds": cpu_seconds}


def report(**fields):
    return {"dtype": "float32", "variant": "as is", "peak_host_bytes": 3_000_000,
            "peak_device_bytes": None, "loss": 2.3, "environment": {"device": "cpu", "host_cores": 2},
            "first_seconds": {"epoch": 1.5, "augment": 0.5, "eval": 9.0},
            "warm_seconds": {"epoch": 1.25, "augment": 0.125, "eval": 1.0}, **fields}
