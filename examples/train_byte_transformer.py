"""Train a small causal transformer on bytes: the model for the tests of CE loss and KL.

    OMP_NUM_THREADS=1 python examples/train_byte_transformer.py tests/assets/byte-transformer

The model is a GPT-NeoX with two layers and width 128. The text is the source of the Python standard
library on this machine; every twentieth module is held out. Nothing is downloaded. The same Python,
the same PyTorch and the same number of threads give the same weights. Open the result with

    sae_lens.load_model.load_model("AutoModelForCausalLM", "tests/assets/byte-transformer")
"""

import argparse
import math
import sysconfig
from itertools import chain, repeat
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import BatchSampler, RandomSampler
from tqdm import trange
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)

BOS = "<|endoftext|>"  # before every module and, as SAELens has it, at the start of every context
BOS_ID = 256  # the tokenizer's first new one, after those of the bytes
CONTEXT_SIZE = 256
BATCH_SIZE = 8
LEARNING_RATE = 4e-3


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, ids in the order of the ByteLevel alphabet, then BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, model_max_length=CONTEXT_SIZE
    )


def modules() -> dict[str, str]:
    """The standard library's sources by their paths, in the order of these."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    return {
        path.relative_to(root).as_posix(): path.read_text("utf-8", errors="replace")
        for path in paths
    }


def contexts(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Token ids, shape (n, CONTEXT_SIZE): BOS, then text cut where the context is full."""
    ids = tokenizer(texts, verbose=False)["input_ids"]
    stream = torch.tensor([token for text in ids for token in (BOS_ID, *text)])
    n = len(stream) // (CONTEXT_SIZE - 1)
    rows = stream[: n * (CONTEXT_SIZE - 1)].reshape(n, CONTEXT_SIZE - 1)
    return torch.cat([torch.full_like(rows[:, :1], BOS_ID), rows], dim=1)


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, tokens: Tensor) -> float:
    """Mean cross-entropy of the next token, in bits."""
    losses = [model(input_ids=rows, labels=rows).loss * len(rows) for rows in tokens.split(64)]
    return float(sum(losses)) / len(tokens) / math.log(2)


def main() -> None:
    """Train, save in float16, and say what the saved model is worth on held-out modules."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=10_000, help="of 8 contexts of 256 bytes")
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    sources = modules()
    train = contexts([text for i, text in enumerate(sources.values()) if i % 20], tokenizer)
    # tables of characters resemble each other too much to tell anything
    held_out = [name for name in list(sources)[::20] if not name.startswith("encodings/")]
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT_SIZE,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        use_parallel_residual=False,
        bos_token_id=BOS_ID,
        eos_token_id=BOS_ID,
    )
    model = GPTNeoXForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=args.steps, pct_start=0.05, cycle_momentum=False
    )
    shuffled = BatchSampler(RandomSampler(train), BATCH_SIZE, drop_last=True)
    batches = chain.from_iterable(repeat(shuffled))
    bar = trange(args.steps, mininterval=2)
    for step in bar:
        rows = train[next(batches)]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(bits=f"{loss.item() / math.log(2):.2f}")

    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    # float16 is for storage: opened, the model computes in float32
    config = AutoConfig.from_pretrained(args.out)
    config.dtype = torch.float32
    config.save_pretrained(args.out)
    saved = AutoModelForCausalLM.from_pretrained(args.out)
    bits = bits_per_byte(saved, contexts([sources[name] for name in held_out], tokenizer))
    print(f"{args.out}: {bits:.2f} bits per byte on {len(held_out)} held-out modules")


if __name__ == "__main__":
    main()
