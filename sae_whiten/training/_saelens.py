"""The internals of SAELens that training under whitening relies on.

Our classes override methods of SAELens and set attributes that its methods read. If a release
renamed one of them, our override would never be called, and SAELens' own training would run
silently. So importing `sae_whiten.training` checks that all of them exist, are called, and take the
expected parameters.
"""

import inspect
from collections.abc import Iterable
from types import CodeType
from typing import Any, NamedTuple

import sae_lens
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner
from sae_lens.saes.abstopk_sae import AbsTopKTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer

import sae_whiten

__all__ = ["RELIED_ON", "Attribute", "Method", "check_saelens"]

KNOWN_TO_WORK = "6.54.12"


class Method(NamedTuple):
    """A method that we override."""

    owner: type
    """The class of SAELens that defines it, or inherits it."""
    name: str
    parameters: tuple[str, ...]
    """Parameters that we rely on, in this order, without self; others must have defaults."""
    caller: type | None = None
    """The class whose methods call it; None: one of ours."""

    def problem(self) -> str | None:
        """What is wrong with it in the SAELens at hand, if anything."""
        method = getattr(self.owner, self.name, None)
        if method is None:
            return f"there is no {self.owner.__name__}.{self.name}"
        parameters = list(inspect.signature(method).parameters.values())[1:]
        names = tuple(parameter.name for parameter in parameters)
        further = parameters[len(self.parameters) :]
        takes_ours = names[: len(self.parameters)] == self.parameters
        if not takes_ours or any(p.default is p.empty for p in further):
            expected, now = ", ".join(self.parameters), ", ".join(names)
            return f"{self.owner.__name__}.{self.name} takes ({now}), not ({expected})"
        return _not_used(self.caller, self.name)


class Attribute(NamedTuple):
    """An attribute that we set or read."""

    owner: type
    """The class whose methods use it."""
    name: str

    def problem(self) -> str | None:
        """What is wrong with it in the SAELens at hand, if anything."""
        return _not_used(self.owner, self.name)


RELIED_ON: tuple[Method | Attribute, ...] = (
    Method(ActivationsStore, "_iterate_filtered_activations", ()),
    Method(ActivationsStore, "_iterate_tokenized_sequences", (), ActivationsStore),
    Method(ActivationsStore, "get_activations", ("batch_tokens",), ActivationsStore),
    Method(
        ActivationsStore,
        "get_batch_tokens",
        ("batch_size", "raise_at_epoch_end", "move_to_model_device"),
        ActivationsStore,
    ),
    Method(ActivationsStore, "get_data_loader", (), ActivationsStore),
    Method(ActivationsStore, "get_multi_hook_data_loader", (), MultiSAETrainingRunner),
    Method(ActivationsStore, "save_to_checkpoint", ("checkpoint_path",)),
    Method(ActivationsStore, "load_from_checkpoint", ("checkpoint_path",)),
    Attribute(ActivationsStore, "_dataloader"),
    Attribute(ActivationsStore, "_hook_names"),
    Attribute(ActivationsStore, "_hook_d_ins"),
    Attribute(ActivationsStore, "iterable_sequences"),
    Attribute(ActivationsStore, "current_row_idx"),
    Method(ActivationScaler, "scale", ("acts",), ActivationScaler),
    Method(ActivationScaler, "unscale", ("acts",)),
    Method(
        ActivationScaler,
        "estimate_whitening",
        ("d_in", "data_provider", "n_batches_for_norm_estimate"),
        SAETrainer,
    ),
    Method(
        ActivationScaler,
        "estimate_scaling_factor",
        ("d_in", "data_provider", "n_batches_for_norm_estimate"),
        SAETrainer,
    ),
    Method(ActivationScaler, "save", ("file_path",), SAETrainer),
    Method(ActivationScaler, "load", ("file_path",), SAETrainer),
    Method(SAETrainer, "fit", (), LanguageModelSAETrainingRunner),
    Method(
        SAETrainer, "build_train_step_log_dict", ("output", "n_training_samples"), MultiSAETrainer
    ),
    Method(SAETrainer, "step", ("batch",), SAETrainer),
    Method(SAETrainer, "maybe_reset_sparsity", (), SAETrainer),
    Method(
        SAETrainer,
        "save_checkpoint",
        ("checkpoint_name", "base_path", "wandb_aliases"),
        SAETrainer,
    ),
    Method(SAETrainer, "save_trainer_state", ("checkpoint_path",), SAETrainer),
    Method(SAETrainer, "load_trainer_state", ("checkpoint_path",), MultiSAETrainer),
    Method(SAETrainer, "set_final_sae_metadata", (), SAETrainer),
    Method(SAETrainer, "_checkpoint_if_needed", (), SAETrainer),
    Method(SAETrainer, "_update_pbar", ("step_output", "pbar", "update_interval"), SAETrainer),
    Attribute(SAETrainer, "activation_scaler"),
    Attribute(SAETrainer, "checkpoint_thresholds"),
    Method(MultiSAETrainer, "fit", (), MultiSAETrainingRunner),
    Method(
        MultiSAETrainer, "save_checkpoint", ("checkpoint_name", "wandb_aliases"), MultiSAETrainer
    ),
    Method(MultiSAETrainer, "load_checkpoint", ("path",), MultiSAETrainingRunner),
    Method(MultiSAETrainer, "_estimate_scaling_factors", (), MultiSAETrainer),
    Method(MultiSAETrainer, "_checkpoint_if_needed", (), MultiSAETrainer),
    Method(MultiSAETrainer, "_maybe_log_sparsity", (), MultiSAETrainer),
    Method(
        MultiSAETrainer,
        "_update_pbar",
        ("step_outputs", "pbar", "update_interval"),
        MultiSAETrainer,
    ),
    Attribute(MultiSAETrainer, "trainers"),
    Attribute(MultiSAETrainer, "checkpoint_thresholds"),
    Method(LanguageModelSAETrainingRunner, "run", ()),
    Method(LanguageModelSAETrainingRunner, "_compile_sae_if_needed", ()),
    Method(
        LanguageModelSAETrainingRunner,
        "save_checkpoint",
        ("checkpoint_path",),
        LanguageModelSAETrainingRunner,
    ),
    Method(
        LanguageModelSAETrainingRunner,
        "save_final_sae",
        ("sae", "output_path", "log_feature_sparsity"),
        LanguageModelSAETrainingRunner,
    ),
    Method(LanguageModelSAETrainingRunner, "_set_sae_metadata", (), LanguageModelSAETrainingRunner),
    Method(MultiSAETrainingRunner, "run", ()),
    Method(MultiSAETrainingRunner, "_set_sae_metadata", (), MultiSAETrainingRunner),
    Method(
        MultiSAETrainingRunner,
        "_save_runner_checkpoint_files",
        ("checkpoint_path",),
        MultiSAETrainingRunner,
    ),
    Method(TrainingSAE, "save_inference_model", ("path",), LanguageModelSAETrainingRunner),
    Method(TrainingSAE, "save_model", ("path",), SAETrainer),
    Method(
        TrainingSAE,
        "load_weights_from_checkpoint",
        ("checkpoint_path",),
        LanguageModelSAETrainingRunner,
    ),
    *(
        Method(
            TrainingSAE,
            "fold_activation_whitening",
            ("mean", "whitening_matrix", "unwhitening_matrix"),
            trainer,
        )
        for trainer in (SAETrainer, MultiSAETrainer)
    ),
    Method(TrainingSAE, "log_histograms", (), SAETrainer),
    Method(TrainingSAE, "training_forward_pass", ("step_input",), SAETrainer),
    Method(TrainingSAE, "encode_with_hidden_pre", ("x",), TrainingSAE),
    Method(TrainingSAE, "decode", ("feature_acts",), TrainingSAE),
    Method(
        TrainingSAE,
        "calculate_aux_loss",
        ("step_input", "feature_acts", "hidden_pre", "sae_out"),
        TrainingSAE,
    ),
    Attribute(TrainingSAE, "mse_loss_fn"),
    Attribute(MatryoshkaBatchTopKTrainingSAE, "mse_loss_fn"),
    Attribute(TopKTrainingSAE, "activation_fn"),
    Method(
        TopKTrainingSAE,
        "calculate_topk_aux_loss",
        ("sae_in", "sae_out", "hidden_pre", "dead_neuron_mask"),
        TopKTrainingSAE,
    ),
    Method(
        AbsTopKTrainingSAE,
        "calculate_abstopk_aux_loss",
        ("sae_in", "sae_out", "hidden_pre", "dead_neuron_mask"),
        AbsTopKTrainingSAE,
    ),
    Method(
        MatryoshkaBatchTopKTrainingSAE,
        "_iterable_decode",
        ("feature_acts", "include_outer_loss"),
        MatryoshkaBatchTopKTrainingSAE,
    ),
    Method(
        MatryoshkaBatchTopKTrainingSAE,
        "calculate_matryoshka_aux_loss",
        ("sae_in", "sae_out", "feature_acts", "hidden_pre", "dead_neuron_mask"),
        MatryoshkaBatchTopKTrainingSAE,
    ),
)


def check_saelens(relied_on: Iterable[Method | Attribute] = RELIED_ON) -> None:
    """Refuse a SAELens in which something that training relies on is missing.

    Raises:
        ImportError: Names the version of SAELens and what is missing.
    """
    problems = [problem for each in relied_on if (problem := each.problem()) is not None]
    if problems:
        raise ImportError(
            f"sae-whiten {sae_whiten.__version__} cannot train with sae-lens "
            f"{sae_lens.__version__}: {'; '.join(problems)}. Parts of training would be SAELens' "
            f"own instead of ours. Install a newer sae-whiten, or sae-lens {KNOWN_TO_WORK}."
        )


def _not_used(caller: type | None, name: str) -> str | None:
    if caller is None or name in _names_used_by(caller, name):
        return None
    return f"{caller.__name__} no longer uses {name}"


def _names_used_by(caller: type, name: str) -> set[str]:
    """Attributes and globals that the methods of a class use, except in its own method `name`."""
    methods = {n: m for base in reversed(caller.__mro__) for n, m in vars(base).items()}
    used: set[str] = set()
    for method_name, method in methods.items():
        code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
        # an attribute that is only set in __init__ has no effect
        if code is not None and method_name not in ("__init__", name):
            used |= _names_in(code)
    return used


def _names_in(code: CodeType) -> set[str]:
    inner: list[Any] = [const for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*map(_names_in, inner))
