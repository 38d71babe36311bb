"""Embeds a list into a cache and tells which prompts its encoders read; started by `test_embeddings.py`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from engines.families.base import load_family
from training import embeddings
from training.embedding_cache import EmbeddingCache


def main() -> None:
    """Arguments: teacher, cache, file of texts as JSON, file to tell in, rows a shard, seconds per encoder call."""
    teacher, folder, texts, told, rows, pause = sys.argv[1:]
    torch.set_num_threads(1)
    embeddings.SHARD_ROWS = int(rows)
    family = load_family(Path(teacher))
    encode = family.encode

    def counted(prompts):
        with Path(told).open("a") as file:
            file.write("".join(json.dumps(prompt) + "\n" for prompt in prompts))
        time.sleep(float(pause))
        return encode(prompts)

    family.encode = counted
    cache = EmbeddingCache.of(Path(teacher), torch.float32, Path(folder))
    embeddings.embed_prompts(family, json.loads(Path(texts).read_text()), cache, batch=2)


if __name__ == "__main__":
    main()
