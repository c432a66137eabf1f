"""Evaluate SAEs on activations with SAELens alone.

usage: python evaluate_saes.py ACTIVATIONS.safetensors LATENTS.safetensors SAE_DIRECTORY...

Results are printed as JSON. The mean latents of every text go to LATENTS.safetensors, in units of
decoder rows of norm 1.
"""

# The demo copies this file to its output, where it is run: it imports nothing of sae_whiten.

import json
import sys

import torch
from sae_lens import SAE
from safetensors.torch import load_file, save_file


def main(activations: str, latents_of_texts: str, *directories: str) -> None:
    """Print the results, and write the latents."""
    found = load_file(activations)
    x, of_texts, text = found["activations"], found["activations_of_texts"], found["text"]
    variance = (x.double() - x.double().mean(0)).square().sum().item()
    counts = text.bincount()[:, None]
    results, pooled = {}, {}
    for directory in directories:
        sae = SAE.load_from_disk(directory)
        squared_error, n_fired = 0.0, torch.zeros(sae.cfg.d_sae)
        total = torch.zeros(len(counts), sae.cfg.d_sae)
        with torch.no_grad():
            for rows in x.split(2048):
                latents = sae.encode(rows)
                squared_error += (rows - sae.decode(latents)).double().square().sum().item()
                n_fired += (latents != 0).sum(0)
            for rows, texts in zip(of_texts.split(2048), text.split(2048), strict=True):
                total.index_add_(0, texts, sae.encode(rows))
        pooled[directory] = total / counts * sae.W_dec.detach().norm(dim=1)
        results[directory] = {
            "explained_variance": 1 - squared_error / variance,
            "l0": n_fired.sum().item() / len(x),
            "dead_latents": int((n_fired == 0).sum()),
            "whitening": getattr(sae.cfg.metadata, "whitening", None),
        }
    save_file(pooled, latents_of_texts)
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
    assert "sae_whiten" not in sys.modules
