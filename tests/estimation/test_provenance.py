import re

import pytest
import torch

from sae_whiten import ActivationStatistics, CorruptFileError, WhiteningConfig, fit_statistics
from sae_whiten.estimation.folders import statistics_file
from tests.support import friendly, tiny_dataset, tiny_model
from tests.training.test_runner import runner

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output of a run."""
    out = tmp_path_factory.mktemp("trained")
    runner(output_path=str(out)).run()
    return out


def save_statistics(trained, folder, **provenance):
    """Statistics as a run of the runner writes them, in a folder of hooks."""
    path = trained / "sae_whiten" / "activation_statistics.safetensors"
    statistics = ActivationStatistics.load(path)
    statistics.provenance.update(provenance)
    statistics.save(statistics_file(folder, HOOK))
    return statistics


def test_training_takes_given_statistics_and_estimates_nothing(trained, tmp_path, monkeypatch):
    statistics = save_statistics(trained, tmp_path / "stats")

    def refuse(*args, **options):
        raise AssertionError("estimated")

    monkeypatch.setattr(ActivationStatistics, "update", refuse)
    statistics.save(tmp_path / "of_earlier_release" / "activation_statistics.safetensors")
    for path in (
        tmp_path / "stats",
        statistics_file(tmp_path / "stats", HOOK),
        trained,
        tmp_path / "of_earlier_release",
    ):
        made = runner(WhiteningConfig(statistics=str(path)), training_tokens=128)
        made.run()
        assert made.trainer.whitening is not None
        assert torch.equal(made.trainer.whitening.mean, statistics.mean)
        assert made.trainer.whitening.n_samples == statistics.n_samples


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_name", "gpt2"),
        ("hook_name", "blocks.0"),
        ("context_size", 64),
        ("prepend_bos", 0),
        ("seqpos_slice", [1, None]),
        ("exclude_special_tokens", [0]),
        ("split", "test[:50%]"),
        ("autocast_lm", True),
        ("use_chat_formatting", True),
    ],
)
def test_statistics_of_something_else_are_refused_by_name_unless_allowed(
    trained, tmp_path, name, value
):
    save_statistics(trained, tmp_path, **{name: value})
    path = str(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} (training has")) as refused:
        runner(WhiteningConfig(statistics=path)).run()
    assert str(refused.value).count("(training has") == 1
    allowed = WhiteningConfig(statistics=path, allow_other_statistics=True)
    runner(allowed, training_tokens=128).run()


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"seqpos_slice": [1, 32]}, {"seqpos_slice": (1, None)}),
        ({"exclude_special_tokens": [2, 1, 1]}, {"exclude_special_tokens": [1, 2]}),
        ({"exclude_special_tokens": []}, {}),
        ({"split": "train[:50%]"}, {}),
    ],
    ids=str,
)
def test_what_is_written_otherwise_but_means_the_same_is_taken(trained, tmp_path, given, options):
    save_statistics(trained, tmp_path, **given)
    runner(WhiteningConfig(statistics=str(tmp_path)), training_tokens=128, **options).run()


@pytest.mark.parametrize("name", ["autocast_lm", "use_chat_formatting"])
def test_what_saelens_does_not_record_of_reading_is_checked_too(trained, tmp_path, name):
    save_statistics(trained, tmp_path, **{name: False})
    made = runner(WhiteningConfig(statistics=str(tmp_path)))
    setattr(made.cfg, name, True)
    with pytest.raises(ValueError, match=re.escape(f"{name}=False (training has True)")):
        made.run()


def test_a_path_of_a_dataset_is_recorded_with_its_split_and_a_dataset_in_memory_has_neither(
    tmp_path,
):
    tiny_dataset(40).to_json(tmp_path / "data" / "data.jsonl")
    path = str(tmp_path / "data")
    for dataset, known in ((path, (path, "train[:50%]")), (tiny_dataset(40), (None, None))):
        found = fit_statistics(
            tiny_model(),
            dataset,
            HOOK,
            n_samples=100,
            context_size=32,
            split="train[:50%]",
            streaming=False,
        )[HOOK].provenance
        assert (found.get("dataset_path"), found.get("split")) == known


def test_statistics_that_do_not_fit_are_one_clear_error(tmp_path):
    statistics = ActivationStatistics(16)
    statistics.update(friendly(100, 16))
    path = statistics_file(tmp_path, "blocks.0.hook_resid_pre")
    statistics.save(path)
    with pytest.raises(ValueError, match="width 16.* 32"):
        runner(WhiteningConfig(statistics=str(path))).run()
    with pytest.raises(
        FileNotFoundError, match=f"no statistics of {HOOK}.*blocks.0.hook_resid_pre"
    ):
        runner(WhiteningConfig(statistics=str(tmp_path))).run()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        runner(WhiteningConfig(statistics="nowhere")).run()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptFileError):
        runner(WhiteningConfig(statistics=str(path))).run()


def test_a_head_that_there_is_not_is_refused():
    for hook_name, head in (("blocks.0.hook_resid_pre", 0), ("blocks.0.attn.hook_z", 4)):
        with pytest.raises(ValueError, match=f"hook_head_index={head}, but {hook_name}"):
            fit_statistics(
                tiny_model(), tiny_dataset(40), hook_name, hook_head_index=head, context_size=32
            )
