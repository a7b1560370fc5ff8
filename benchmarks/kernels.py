"""An MLP on XLA's CPU backend: its activation applied to (B, L, F), and to the same numbers as a matrix (B x L, F).

python benchmarks/kernels.py
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from mmx.layers.mlp import rowwise

B, L, D, F = 128, 37, 128, 384


def seconds(step, *arguments, repeats=20) -> float:
    """The median time of a step."""
    jax.block_until_ready(step(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(step(*arguments))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main() -> None:
    rng = np.random.default_rng(0)
    x, up, down = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((B, L, D), (D, F), (F, D)))

    def gradient(activation):
        return jax.jit(jax.grad(lambda x, up, down: (activation(x @ up) @ down).sum(), argnums=(0, 1, 2)))

    array, matrix = gradient(jax.nn.gelu), gradient(lambda h: rowwise(jax.nn.gelu, h))
    for _ in range(2):
        a, m = seconds(array, x, up, down), seconds(matrix, x, up, down)
        print(f"gradient of an MLP with GELU: array {1e3 * a:.1f} ms, matrix {1e3 * m:.1f} ms, ratio {a / m:.2f}")


if __name__ == "__main__":
    main()
