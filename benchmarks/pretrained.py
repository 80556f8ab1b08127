"""One evaluation of DDPM's network of CIFAR-10, beside the original in torch.

The network has 35.7 million weights and gets 8 images.

    python -m benchmarks pretrained --torch PYTHON

PYTHON is that of an environment with torch and diffusers, which makes the folder, with
random weights, and evaluates the original in a process of its own. Both are compiled or
warmed up first; then they take turns on the same cores, so that whatever else the
machine does hits both; the original with one thread and with one for each core, since
two can be slower than one where something else runs, and the faster of the two is
compared. Exits with 1 if the ratio of medians is above 1, or the outputs differ by more
than 1e-4 of the greatest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from report import publish

import composeprob as cp

IMAGES, TIME, PAIRS = 8, 500, 45
ORIGINAL = """
import json, os, sys, time
import diffusers, numpy, torch
folder = sys.argv[1]
torch.manual_seed(0)
network = diffusers.UNet2DModel(
    sample_size=32,
    block_out_channels=(128, 256, 256, 256),
    layers_per_block=2,
    attention_head_dim=None,
    norm_eps=1e-6,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    downsample_padding=0,
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    flip_sin_to_cos=False,
    freq_shift=1,
).eval()
network.save_pretrained(folder + "/unet")
diffusers.DDPMScheduler().save_pretrained(folder + "/scheduler")
index = {
    "unet": ["diffusers", "UNet2DModel"],
    "scheduler": ["diffusers", "DDPMScheduler"],
}
json.dump(index, open(folder + "/model_index.json", "w"))
x = torch.randn(IMAGES, 3, 32, 32)
numpy.save(folder + "/x.npy", x.permute(0, 2, 3, 1).numpy())
with torch.inference_mode():
    for _ in range(3):
        y = network(x, TIME).sample
    numpy.save(folder + "/y.npy", y.permute(0, 2, 3, 1).numpy())
    weights = sum(p.numel() for p in network.parameters())
    print("ready", torch.__version__, weights, flush=True)
    for line in sys.stdin:
        torch.set_num_threads(int(line))
        network(x, TIME)
        began = time.perf_counter()
        network(x, TIME)
        print(time.perf_counter() - began, flush=True)
""".replace("IMAGES", str(IMAGES)).replace("TIME", str(TIME))


def gemm() -> float:
    """Floating-point operations a second of a large product of matrices."""
    a = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    seconds = []
    for _ in range(7):
        began = time.perf_counter()
        product(a).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / statistics.median(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", required=True, metavar="PYTHON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        original = subprocess.Popen(
            [arguments.torch, "-c", ORIGINAL, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert original.stdin is not None
        assert original.stdout is not None
        _, version, weights = original.stdout.readline().split()

        began = time.perf_counter()
        model = cp.from_diffusers(folder)
        loaded = time.perf_counter() - began
        evaluate = jax.jit(
            lambda network, x: jax.vmap(lambda x: network(x, jnp.float32(TIME)))(x)
        )
        x = jnp.asarray(np.load(Path(folder, "x.npy")))
        began = time.perf_counter()
        y = np.asarray(evaluate(model.network, x))
        first = time.perf_counter() - began
        wanted = np.load(Path(folder, "y.npy"))
        error = float(np.abs(y - wanted).max() / np.abs(wanted).max())
        threads = sorted({1, len(os.sched_getaffinity(0))})
        turns = []
        for _ in range(PAIRS):
            turn = []
            for count in threads:
                original.stdin.write(f"{count}\n")
                original.stdin.flush()
                turn.append(float(original.stdout.readline()))
            evaluate(model.network, x).block_until_ready()
            began = time.perf_counter()
            evaluate(model.network, x).block_until_ready()
            turns.append((*turn, time.perf_counter() - began))
        original.stdin.close()
        original.wait()
    *theirs, ours = (statistics.median(column) for column in zip(*turns, strict=True))
    ratio = ours / min(theirs)
    cost = evaluate.lower(model.network, x).compile().cost_analysis() or {}
    flops = float(cost.get("flops", np.nan))
    peak = gemm()
    rows = [
        *(
            [
                f"the original, torch {version}, {count} thread{'s' * (count > 1)}",
                f"{seconds:.3f}",
            ]
            for count, seconds in zip(threads, theirs, strict=True)
        ),
        ["composeprob", f"{ours:.3f}"],
        ["ratio to the faster of the original's", f"{ratio:.3f}"],
        [
            "share of the speed of a product of 2048×2048 matrices",
            f"{flops / ours / peak:.2f}",
        ],
        ["greatest difference of the outputs, of the greatest", f"{error:.1e}"],
        ["to load the folder", f"{loaded:.2f}"],
        ["first evaluation, compilation included", f"{first:.2f}"],
    ]
    checks = {
        "not slower than the original": ratio <= 1.0,
        "the same outputs up to 1e-4": error <= 1e-4,
    }
    details = {
        "turns": turns,
        "ratio": ratio,
        "flops": flops,
        "gemm": peak,
        "error": error,
        "load": loaded,
        "first": first,
    }
    title = (
        f"A network of {int(weights) / 1e6:.1f} million weights, one evaluation for "
        f"{IMAGES} images of 32×32: seconds"
    )
    shown = "python -m benchmarks pretrained --torch PYTHON"
    return publish(
        "pretrained", title, ["", "seconds"], rows, checks, details, made_by=shown
    )


if __name__ == "__main__":
    sys.exit(main())
