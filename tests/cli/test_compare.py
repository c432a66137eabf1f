"""The command `sae-whiten compare`: its flags, what it refuses early, and what it prints."""

import argparse
import dataclasses
import json
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
    assert "--held-out-sequences 16" in said
    assert "15 rows" in said
    assert "lower it to 7" in said
    assert not (tmp_path / "out").exists()


def test_the_answer_is_printed_and_not_the_whole_report(tmp_path, monkeypatch, capsys):
    Dataset.from_dict({"text": ["a text"] * 40}).to_parquet(tmp_path / "rows" / "part.parquet")

    def compare(comparison, model, dataset, out, **names):
        out.mkdir()
        (out / "settings.json").write_text(json.dumps({"sparsity": [16]}))
        return [
            {
                "architecture": "topk",
                "condition": condition,
                "sparsity": 16,
                "seed": seed,
                "metrics": {"explained_variance": ev + seed**2 / 1e4, "dead_latents": 7, "l0": 16},
            }
            for condition, ev in (("none", 0.5), ("original", 0.6))
            for seed in comparison.seeds
        ]

    monkeypatch.setattr("sae_lens.load_model.load_model", lambda *args, **options: None)
    monkeypatch.setattr("sae_whiten.comparison.compare.compare", compare)
    monkeypatch.setattr("sae_whiten.comparison.feature_page.write_feature_page", lambda *_: None)
    monkeypatch.setattr("sae_whiten.comparison.report.page.comparison_figures", lambda *_: [])
    out = tmp_path / "out"
    command = ["compare", "--model-name", "tiny", "--hook-name", "h", "--out", str(out)]
    command += ["--dataset-path", str(tmp_path / "rows"), "--held-out-sequences", "16"]
    assert main([*command, "--no-probing", "--seeds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "topk, k = 16" in printed
    assert [line.split() for line in printed.splitlines() if line.startswith(("none", "orig"))] == [
        ["none", "0.500", "7.0", "16.0"],
        ["original", "0.600", "7.0", "16.0"],
    ]
    assert "1 seed: nothing is tested" in printed
    assert str(out / "report.html") in printed
    assert "--seeds 3" in printed
    assert len(printed.splitlines()) < 15
    assert "| condition |" in (out / "table.md").read_text()


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
    spaced = parsed("--conditions", "none", "half", "--sparsity", "8,", "16", "--d-sae", "64")
    assert (spaced.conditions, spaced.sparsity) == (args.conditions, args.sparsity)
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
    ignored = [
        (
            ("--no-probing", "--labels-dataset", "x"),
            "without probing, --labels-dataset has no effect",
        ),
        (("--probes", "none", "--n-texts", "5"), "without probing, --n-texts has no effect"),
        (("--probes", "sae-probes:20", "--labels-dataset", "x"), "--labels-dataset replaces"),
        (("--probes", "typo", "--labels-dataset", "x"), "--labels-dataset replaces"),
        (("--probe-tokens", "mean"), "--probe-tokens needs --probes sae-probes"),
        (("--text-column", "body"), "--text-column needs --labels-dataset"),
        (("--label-column", "kind"), "--label-column needs --labels-dataset"),
    ]
    for flags, message in ignored:
        with pytest.raises(ValueError, match=message):
            probed_texts(parsed(*flags))
    monkeypatch.setitem(sys.modules, "sae_probes.utils_data", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .sae-whiten\[probes\]"):
        probed_texts(parsed("--probes", "sae-probes:20"))
