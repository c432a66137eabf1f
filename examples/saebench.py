"""Run SAEBench's sparse probing, SCR and TPP on an SAE that was trained under whitening.

    pip install sae-bench      # into an environment of its own: it needs numpy < 2, datasets < 4
    JAXTYPING_DISABLE=1 python examples/saebench.py sae-pythia-8 \\
        --model pythia-160m-deduped --device cuda

A trained SAE is saved as an ordinary SAELens SAE, so sae-whiten is not imported here. The
model and SAEBench's data sets come from the Hugging Face hub; their activations take some 10 GB in
./artifacts. SAEBench has batch sizes and dtypes for Pythia 70M and 160M and for Gemma 2. Its
version 0.6.0 uses one name for two array sizes, which newer versions of jaxtyping refuse.
"""

import argparse
from typing import Any

import sae_bench.evals.scr_and_tpp.main as scr_and_tpp  # pyright: ignore[reportMissingImports]
import sae_bench.evals.sparse_probing.main as sparse_probing  # pyright: ignore[reportMissingImports]
import torch
from sae_bench.evals.scr_and_tpp.eval_config import (  # pyright: ignore[reportMissingImports]
    ScrAndTppEvalConfig,
)
from sae_bench.evals.sparse_probing.eval_config import (  # pyright: ignore[reportMissingImports]
    SparseProbingEvalConfig,
)
from sae_bench.sae_bench_utils.activation_collection import (  # pyright: ignore[reportMissingImports]
    LLM_NAME_TO_BATCH_SIZE,
    LLM_NAME_TO_DTYPE,
)
from sae_lens import SAE


@torch.no_grad()
def with_unit_decoder(sae: SAE[Any]) -> SAE[Any]:
    """The same SAE with decoder rows of unit norm and latents larger by as much.

    SAEBench compares the sizes of latents and expects such a decoder. SAELens' `fold_W_dec_norm`
    refuses TopK SAEs whose latents would be ranked in other units afterwards; here latents are
    scaled after they were ranked.
    """
    try:
        sae.fold_W_dec_norm()
    except NotImplementedError:
        encode, norms = sae.encode, sae.W_dec.norm(dim=1).clamp(min=1e-8)
        sae.W_dec.div_(norms[:, None])
        sae.encode = lambda x: encode(x) * norms.to(x)
    return sae


def main() -> None:
    """Run the three evaluations; SAEBench writes a JSON file for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sae", help="folder of the SAE, trained on a HookedTransformer")
    parser.add_argument("--model", required=True, choices=sorted(LLM_NAME_TO_BATCH_SIZE))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="saebench", help="folder (default: ./%(default)s)")
    args = parser.parse_args()

    settings: dict[str, Any] = {
        "model_name": args.model,
        "llm_batch_size": LLM_NAME_TO_BATCH_SIZE[args.model],
        "llm_dtype": LLM_NAME_TO_DTYPE[args.model],
    }
    for name, evaluation, config in (
        ("sparse_probing", sparse_probing, SparseProbingEvalConfig(**settings)),
        ("scr", scr_and_tpp, ScrAndTppEvalConfig(perform_scr=True, **settings)),
        ("tpp", scr_and_tpp, ScrAndTppEvalConfig(perform_scr=False, **settings)),
    ):
        sae = with_unit_decoder(SAE.load_from_disk(args.sae, device=args.device))
        results = evaluation.run_eval(
            config, [("sae", sae)], args.device, f"{args.out}/{name}", force_rerun=True
        )
        for result in results.values():
            print(name, result["eval_result_metrics"])


if __name__ == "__main__":
    main()
