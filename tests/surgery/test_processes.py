"""The sample may be spread over processes, none of which holds all of it."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = """
import sys
import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from jaxbn import surgery

process, port = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
rows = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
mesh = jax.make_mesh((4,), ("data",))
x = jax.make_array_from_callback(rows.shape, jax.NamedSharding(mesh, jax.P("data")), lambda index: rows[index])
net = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
variables = net.init(jax.random.key(0), rows)
nnx_net = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
for model, arrays in ((net, variables), (nnx_net, None)):
    for operation in (surgery.freeze, surgery.fold):
        spread, whole = (operation(model, arrays, sample) for sample in (x, rows))
        assert spread.layers == whole.layers and spread.difference <= 1e-5 * spread.scale
        print('scales', spread.scale, whole.scale)
"""


@pytest.mark.slow
def test_a_sample_may_be_spread_over_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(number), str(port)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    lines = [[line.split()[1:] for line in output.splitlines() if line.startswith("scales")] for output in outputs]
    assert lines[0] == lines[1]
    scales = np.array(lines[0], float)
    assert scales.shape == (4, 2) and (scales > 1).all()
    np.testing.assert_allclose(scales[:, 0], scales[:, 1], rtol=1e-6)
