"""What we rely on inside SAELens: that it is there, and that we know all of it."""

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens import llm_sae_training_runner
from sae_lens.load_model import HookedProxyLM
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer

import sae_whiten.training
from sae_whiten.architectures.folding import why_not_foldable
from sae_whiten.training import activations_store, multi_runner, multi_trainer, runner, scaler
from sae_whiten.training import trainer as trainer_module
from sae_whiten.training._saelens import RELIED_ON, Attribute, Method, check_saelens
from sae_whiten.training.training_sae import _whitened_class

# names that both packages happen to have
_COINCIDENCES = {"_", "_fingerprint", "_kl", "_sae"}
_PARSER = "_parse_cfg_args"  # of the command line, which looks for it itself
_HOOKS = "_names_filter"  # an argument of a model of transformers, which takes any other silently


@pytest.mark.parametrize(
    "relied_on", RELIED_ON, ids=lambda each: f"{each.owner.__name__}.{each.name}"
)
def test_saelens_has_and_uses_what_we_rely_on(relied_on: Method | Attribute) -> None:
    assert relied_on.problem() is None


def test_saelens_has_the_parser_of_its_command_line() -> None:
    assert [*inspect.signature(getattr(llm_sae_training_runner, _PARSER)).parameters] == ["args"]


def test_saelens_ends_the_pass_of_a_model_of_transformers_after_the_last_hook() -> None:
    assert _HOOKS in inspect.signature(HookedProxyLM.forward).parameters


def _our_training_classes() -> list[type]:
    modules = (activations_store, trainer_module, multi_trainer, runner, multi_runner, scaler)
    classes = [
        c
        for module in modules
        for c in vars(module).values()
        if inspect.isclass(c) and c.__module__ == module.__name__
    ]
    return [*classes, *(_whitened_class(c) for c in _registered() if why_not_foldable(c) is None)]


def _registered() -> list[type[Any]]:
    return [sae_class for sae_class, _ in SAE_TRAINING_CLASS_REGISTRY.values()]


def _overridden(ours: type) -> set[tuple[type, str]]:
    """Methods of SAELens that `ours` overrides, or a class of this package that it inherits; but
    not what an architecture of our own implements, as every architecture has to."""
    found = set()
    for i, base in enumerate(ours.__mro__):
        if not base.__module__.startswith("sae_whiten.") or base in _registered():
            continue
        for later in ours.__mro__[i + 1 :]:
            if later.__module__.startswith("sae_lens."):
                names = vars(base).keys() & vars(later).keys()
                found |= {(later, n) for n in names if inspect.isfunction(vars(later)[n])}
    return {(owner, name) for owner, name in found if not name.startswith("__")}


def test_every_method_that_we_override_is_listed() -> None:
    overridden = {pair for ours in _our_training_classes() for pair in _overridden(ours)}
    assert len(overridden) > 40
    unlisted = [
        f"{owner.__name__}.{name}"
        for owner, name in overridden
        if not any(
            each.name == name and (issubclass(owner, each.owner) or issubclass(each.owner, owner))
            for each in RELIED_ON
        )
    ]
    assert not unlisted


def _private_names(package: Any) -> set[str]:
    """Names that start with one underscore, in the files of a package that import SAELens: of
    attributes, functions, their arguments and imports, also as strings."""
    names: set[str] = set()
    for file in Path(package.__file__).parent.rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        if "import sae_lens" not in source and "from sae_lens" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, (ast.arg, ast.keyword)) and node.arg is not None:
                names.add(node.arg)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value if node.value.isidentifier() else "")
            elif isinstance(node, ast.ImportFrom):
                names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_every_private_name_that_we_share_with_saelens_is_listed() -> None:
    shared = _private_names(sae_whiten) & _private_names(sae_lens)
    of_torch = {name for name in shared if hasattr(torch.nn.Module(), name)}
    listed = {each.name for each in RELIED_ON} | {_PARSER, _HOOKS}
    assert shared - of_torch - _COINCIDENCES <= listed
    assert {n for n in listed if n.startswith("_")} <= shared


class _Renamed:
    """A store in which a method was renamed."""

    def _iterate_activations(self) -> None: ...


class _Uncalled:
    """A trainer that has the method, and no longer calls it."""

    def fit(self) -> None: ...

    def _checkpoint_if_needed(self) -> None: ...


class _OtherParameters:
    def save_checkpoint(self, directory: str) -> None: ...

    def fit(self) -> None:
        self.save_checkpoint("a")


class _MoreParameters:
    def save_checkpoint(self, checkpoint_name: str, compress: bool = False) -> None: ...

    def fit(self) -> None:
        self.save_checkpoint("a")


@pytest.mark.parametrize(
    ("relied_on", "facts"),
    [
        (
            Method(_Renamed, "_iterate_filtered_activations", ()),
            ["no _Renamed._iterate_filtered_activations"],
        ),
        (
            Method(_Uncalled, "_checkpoint_if_needed", (), _Uncalled),
            ["_Uncalled no longer uses _checkpoint_if_needed"],
        ),
        (
            Method(_OtherParameters, "save_checkpoint", ("checkpoint_name",), _OtherParameters),
            ["_OtherParameters.save_checkpoint", "(directory)", "(checkpoint_name)"],
        ),
        (Attribute(_Renamed, "mse_loss_fn"), ["_Renamed no longer uses mse_loss_fn"]),
    ],
)
def test_a_saelens_that_lacks_something_is_refused_by_version_and_name(
    relied_on: Method | Attribute, facts: list[str]
) -> None:
    with pytest.raises(ImportError) as raised:
        check_saelens([*RELIED_ON, relied_on])
    for fact in [*facts, f"sae-lens {sae_lens.__version__}"]:
        assert fact in str(raised.value)


def test_further_parameters_with_defaults_are_no_reason_to_refuse() -> None:
    check_saelens([Method(_MoreParameters, "save_checkpoint", ("checkpoint_name",))])


def test_training_is_refused_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(SAETrainer, "_checkpoint_if_needed")
    monkeypatch.delattr(ActivationsStore, "_iterate_tokenized_sequences")
    with pytest.raises(ImportError, match=r"SAETrainer\._checkpoint_if_needed") as raised:
        importlib.reload(sae_whiten.training)
    assert "ActivationsStore._iterate_tokenized_sequences" in str(raised.value)
