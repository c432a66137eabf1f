"""The command `sae-whiten compare`: what it refuses before anything is loaded."""

from datasets import Dataset

from sae_whiten.cli import main


def test_too_few_rows_are_refused_before_a_model_is_loaded(tmp_path, capsys):
    Dataset.from_dict({"text": ["a text"] * 15}).to_parquet(tmp_path / "rows" / "part.parquet")
    command = ["compare", "--model-name", "no/such-model", "--hook-name", "blocks.0"]
    command += ["--dataset-path", str(tmp_path / "rows"), "--out", str(tmp_path / "out")]
    assert main([*command, "--held-out-sequences", "16"]) == 2
    said = capsys.readouterr().err
    assert "15 rows" in said
    assert "lower held_out_sequences to 7" in said
    assert not (tmp_path / "out").exists()
