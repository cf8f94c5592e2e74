"""Settings that must be made before JAX is first used."""

import os

import jax

jax.config.update("jax_num_cpu_devices", 8)
os.environ.setdefault("PJRT_NPROC", "32")  # threads: with one for each device, two collectives at once can hang
