"""Checks an installed wheel in a clean environment: `python smoke.py README.md`, outside the repository.

Runs the examples of the README's section "Use", and a training step in linen and in nnx.
"""

import importlib.util
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

NOT_NEEDED = ("matplotlib", "tyro", "sklearn", "pooch", "pytest")  # dependencies of the experiments and tests


def main(readme: Path) -> None:
    """Runs all checks."""
    here = Path(jaxbn.__file__).parent
    assert "site-packages" in here.parts, f"this is the source folder {here}, not the installed wheel"
    assert (here / "py.typed").is_file()
    installed = [name for name in NOT_NEEDED if importlib.util.find_spec(name)]
    assert not installed, f"{', '.join(installed)} are installed, so that this shows nothing"
    section = re.search(r"^## Use\n(.*?)^## ", readme.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    scope = {"__name__": "readme"}
    for block in re.findall(r"^```python\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL):
        exec(compile(block, readme.name, "exec"), scope)
    linen_step()
    nnx_step()
    print(f"jaxbn works: Python {sys.version.split()[0]}, jax {jax.__version__}")


def linen_step() -> None:
    """Takes a step of SGD in linen."""
    x, layer = jnp.arange(8.0).reshape(4, 2), jaxbn.linen.BatchNorm(use_running_average=False, momentum=0.9)
    variables = layer.init(jax.random.key(0), x)

    @jax.jit
    def step(params, batch_stats):
        def loss(params):
            y, updates = layer.apply({"params": params, "batch_stats": batch_stats}, x, mutable=["batch_stats"])
            return ((y - x) ** 2).mean(), updates["batch_stats"]

        gradients, batch_stats = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), batch_stats

    params, batch_stats = step(variables["params"], variables["batch_stats"])
    assert jnp.allclose(batch_stats["mean"], 0.1 * x.mean(0)) and not jnp.allclose(params["bias"], 0)


def nnx_step() -> None:
    """Takes a step of SGD in nnx."""
    x, layer = jnp.arange(8.0).reshape(4, 2), jaxbn.nnx.BatchNorm(2, momentum=0.9, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        optimizer.update(layer, nnx.grad(lambda layer: ((layer(x) - x) ** 2).mean())(layer))

    step(layer, optimizer)
    assert jnp.allclose(layer.mean[...], 0.1 * x.mean(0)) and not jnp.allclose(layer.bias[...], 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
