"""The bank that the embedded model learns from: variants of every base picture, and their latents.

    python examples/emoji/build_bank.py --work build/emoji pictures     # bank.npy, bank.json (before the autoencoder)
    python examples/emoji/build_bank.py --work build/emoji latents      # latents.npy (after it)
    python examples/emoji/build_bank.py --work build/emoji maps         # maps.npy (before the denoiser)

`bank.npy` holds COUNT pictures (64, 64, 3) uint8 a record, `bank.json` the parts of their captions, `latents.npy` the
means of the autoencoder's posterior in float16, `maps.npy` what an ImageNet network sees in 4 × 4 parts of the picture
(block 10 of lite0, 112 channels), in the same order: encoding is cheap beside a step of the denoiser, so every picture
is encoded once and its variants are drawn from the bank. Held-out names are left out. All are resumable: what the file
holds already is not made again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import Lite0, load_rgba, to_unit
from diffusers import AutoencoderKL
from variants import variants_of

COUNT = 13
MAP_BLOCK, MAP_SHAPE = 10, (112, 4, 4)  # of lite0 at 64 pixels


def open_array(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """A memory-mapped .npy of this shape, the present one where it fits."""
    if path.exists():
        found = np.lib.format.open_memmap(path, "r+")
        if found.shape == shape and found.dtype == dtype:
            return found
    return np.lib.format.open_memmap(path, "w+", dtype, shape)


def make_pictures(work: Path, count: int, processes: int) -> None:
    images, records = load_rgba(work)
    taken = {r["name"] for r in records}
    known = [i for i, r in enumerate(records) if not r["held_out"]]
    path, progress = work / "bank.npy", work / "bank.part.json"
    bank = open_array(path, (len(known), count, 64, 64, 3), np.uint8)
    rows = json.loads(progress.read_text()) if progress.exists() else []
    left = known[len(rows) :]
    make = partial(variants_of, count=count, taken=taken)
    with ProcessPoolExecutor(processes) as pool:
        made = pool.map(make, (images[i] for i in left), (records[i] for i in left), chunksize=20)
        for n, variants in enumerate(made, len(rows)):
            bank[n] = np.stack([v.pixels for v in variants])
            rows.append([v.parts for v in variants])
            if n % 100 == 99:
                bank.flush()
                progress.write_text(json.dumps(rows))
                print(f"{n + 1} of {len(known)} records", flush=True)
    bank.flush()
    (work / "bank.json").write_text(json.dumps(rows))
    progress.unlink(missing_ok=True)


@torch.no_grad()
def encode(work: Path, name: str, shape: tuple[int, ...], encoder: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """`name`.npy (records, count, *shape) float16 of what `encoder` makes of pictures (N, 3, 64, 64) in [-1, 1]."""
    bank = np.load(work / "bank.npy", mmap_mode="r")
    part_path, progress = work / f"{name}.part.npy", work / f"{name}.part.json"
    array = open_array(part_path, (*bank.shape[:2], *shape), np.float16)
    first = json.loads(progress.read_text()) if progress.exists() else 0
    for start in range(first, len(bank), 8):
        part = bank[start : start + 8]
        pixels = to_unit(torch.tensor(part.reshape(-1, 64, 64, 3)).permute(0, 3, 1, 2))
        array[start : start + 8] = encoder(pixels).cpu().numpy().reshape(len(part), bank.shape[1], *shape)
        if start % 400 == 0:
            array.flush()
            progress.write_text(json.dumps(start))
            print(f"{start} of {len(bank)} records", flush=True)
    array.flush()
    part_path.replace(work / f"{name}.npy")
    progress.unlink(missing_ok=True)


def make_latents(work: Path, device: str) -> None:
    vae = AutoencoderKL.from_pretrained(work / "vae").to(device).eval()
    side = 64 // 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (vae.config.latent_channels, side, side)
    encode(work, "latents", shape, lambda pixels: vae.encode(pixels.to(device)).latent_dist.mean)


def make_maps(work: Path, device: str) -> None:
    lite0 = Lite0().to(device)
    encode(work, "maps", MAP_SHAPE, lambda pixels: lite0.maps(pixels.to(device), (MAP_BLOCK,))[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pictures", "latents", "maps"))
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--count", type=int, default=COUNT, help="pictures a record, at least 2")
    parser.add_argument("--processes", type=int, default=1, help="that make pictures")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.count < 2:
        parser.error("--count is less than 2: the picture itself, and a variant of it.")
    if args.what == "pictures" and not (args.work / "bank.json").exists():
        make_pictures(args.work, args.count, args.processes)
    elif args.what == "latents" and not (args.work / "latents.npy").exists():
        make_latents(args.work, args.device)
    elif args.what == "maps" and not (args.work / "maps.npy").exists():
        make_maps(args.work, args.device)


if __name__ == "__main__":
    main()
