"""The command `sae-whiten compare`: what it refuses before anything is loaded."""

import argparse
import dataclasses
import sys

import pytest
from datasets import Dataset

from sae_whiten.cli import main
from sae_whiten.cli._options import help_of
from sae_whiten.cli._probes import probed_texts
from sae_whiten.cli.compare import add_arguments
from sae_whiten.comparison.options import ComparisonOptions


def test_too_few_rows_are_refused_before_a_model_is_loaded(tmp_path, capsys):
    Dataset.from_dict({"text": ["a text"] * 15}).to_parquet(tmp_path / "rows" / "part.parquet")
    command = ["compare", "--model-name", "no/such-model", "--hook-name", "blocks.0"]
    command += ["--dataset-path", str(tmp_path / "rows"), "--out", str(tmp_path / "out")]
    assert main([*command, "--held-out-sequences", "16"]) == 2
    said = capsys.readouterr().err
    assert "15 rows" in said
    assert "lower held_out_sequences to 7" in said
    assert not (tmp_path / "out").exists()


REQUIRED = ["--model-name", "m", "--hook-name", "h", "--dataset-path", "d", "--out", "o"]


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([*REQUIRED, *arguments])


def test_every_option_is_a_flag_with_the_same_default_and_its_help():
    args = vars(parsed())
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    helps = " ".join((action.help or "").replace("%%", "%") for action in parser._actions)
    for field in dataclasses.fields(ComparisonOptions):
        if field.default is not dataclasses.MISSING and field.name != "seeds":
            assert args[field.name] == field.default
        assert help_of(ComparisonOptions, field.name) in helps
        assert len(help_of(ComparisonOptions, field.name)) > 10
    assert args["seeds"] == len(ComparisonOptions.seeds)
    assert args["sae_options"] == {}


def test_flags_give_values_of_the_type_of_their_field():
    args = parsed(
        *("--conditions", "none, half", "--sparsity", "8,16", "--coefficients", "0.5,1"),
        *("--d-sae", "64", "--lr", "1e-3", "--no-prepend-bos", "--batch-size-prompts", "4"),
        *("--sae-options", '{"topk": {"aux_loss_coefficient": 0}}'),
        *("--exclude-special-tokens", "1", "2"),
    )
    assert args.conditions == ["none", "half"]
    assert (args.sparsity, args.coefficients) == ([8, 16], [0.5, 1.0])
    assert (args.d_sae, args.lr, args.prepend_bos) == (64, 1e-3, False)
    assert args.store_batch_size_prompts == 4
    assert args.sae_options == {"topk": {"aux_loss_coefficient": 0}}
    assert args.exclude_special_tokens == [1, 2]
    assert parsed("--include-special-tokens").exclude_special_tokens is False


def test_a_number_that_is_none_is_refused_by_its_flag(capsys):
    assert main(["compare", *REQUIRED, "--sparsity", "8", "--training-tokens", "10"]) == 2
    assert "--training-tokens 10: must be" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parsed("--sparsity", "8,x")
    assert "--sparsity: invalid list of int value: '8,x'" in capsys.readouterr().err


def test_what_is_probed_with_is_refused_by_its_flag(monkeypatch):
    with pytest.raises(ValueError, match=r"--probes probes: give sae-probes, sae-probes:N, lib"):
        probed_texts(parsed("--probes", "probes"))
    assert probed_texts(parsed("--no-probing")) is None
    assert probed_texts(parsed("--probes", "none")) is None
    monkeypatch.setitem(sys.modules, "sae_probes.utils_data", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .sae-whiten\[probes\]"):
        probed_texts(parsed("--probes", "sae-probes:20"))
