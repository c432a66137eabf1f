"""Train a TopK SAE on GPT-2 under whitening, save it, and open it with plain SAELens.

    python examples/train_gpt2.py --dataset monology/pile-uncopyrighted --device cuda

Takes any Hugging Face dataset with a `text` column. The model and the dataset are downloaded.
"""

import argparse
from typing import Any

import torch
from sae_lens import SAE, LanguageModelSAERunnerConfig, LoggingConfig, TopKTrainingSAEConfig

from sae_whiten import WhiteningConfig, WhiteningTrainingRunner


def main(argv: list[str] | None = None, **overrides: Any) -> float:
    """Returns the explained variance; `overrides` go to the runner (override_model, ...)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="monology/pile-uncopyrighted")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--d_in", type=int, default=768)
    parser.add_argument("--training_tokens", type=int, default=100_000_000)
    parser.add_argument("--output", default="sae-gpt2-6")
    args = parser.parse_args(argv)

    cfg = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(
            d_in=args.d_in,
            d_sae=32 * args.d_in,
            k=32,
            normalize_activations="covariance_whitening",
        ),
        model_name="gpt2",
        hook_name="blocks.6.hook_resid_pre",
        dataset_path=args.dataset,
        is_dataset_tokenized=False,
        context_size=256,
        training_tokens=args.training_tokens,
        device=args.device,
        output_path=args.output,
        logger=LoggingConfig(log_to_wandb=False),
    )
    runner = WhiteningTrainingRunner(cfg, whitening=WhiteningConfig(), **overrides)
    runner.run()

    # from here on nothing knows about whitening: plain SAELens, raw activations
    sae = SAE.load_from_disk(args.output, device=args.device)
    x = runner.activations_store.next_batch().to(sae.device, sae.dtype)
    with torch.no_grad():
        error = (x - sae(x)).pow(2).sum()
    explained_variance = 1 - float(error / (x - x.mean(0)).pow(2).sum())
    print(f"{args.output}: explained variance {explained_variance:.3f} on {len(x)} activations")
    return explained_variance


if __name__ == "__main__":
    main()
