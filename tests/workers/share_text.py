"""Encodes prompts with a T5 whose weights are spread over processes; writes what came of it to ``<folder>/<rank>.pt``.

Arguments: the T5's folder, the folder for results.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from opensora.accel import DDP, DDPSpec
from opensora.core.text_cache import CachedTextEncoder
from opensora.core.text_sharding import SharedTextEncoder, share_weights
from opensora.models.text_encoders.t5 import T5Encoder, T5EncoderSpec

T5, FOLDER = sys.argv[1:]
WORDS = ["a red sea", "a wave", "red", "a sea a wave", "wave wave", ""]


def build() -> T5Encoder:
    return T5Encoder(T5EncoderSpec(from_pretrained=T5, model_max_length=6))


def main() -> None:
    whole = build()
    with DDP(DDPSpec(timeout_s=60), device="cpu") as accelerator:
        rank = accelerator.rank
        results: dict[str, object] = {}
        for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
            sharded = build()
            share_weights(sharded, accelerator, dtype)
            parameters = list(sharded.parameters())
            results[name] = {
                "is dealt out": all(isinstance(each, DTensor) for each in parameters),
                "whole": sum(each.numel() for each in parameters),
                "own": sum(each.to_local().numel() for each in parameters),
                "dtypes": sorted({str(each.dtype) for each in parameters}),
            }
            if name == "fp32":
                own = WORDS[: 2 + 3 * rank]  # not as many in each process
                remembering = CachedTextEncoder(sharded, capacity=10**6)
                shared = SharedTextEncoder(remembering, sharded=sharded, accelerator=accelerator)
                for _ in range(2):  # anew, then remembered
                    results["embedding"] = shared.encode(own).text_embedding
                results["expected"] = torch.cat([whole.encode([each]).text_embedding for each in own])
                plain = SharedTextEncoder(sharded, sharded=sharded, accelerator=accelerator)
                results["embedding of a batch"] = plain.encode(own).text_embedding
                results["expected of a batch"] = whole.encode(own).text_embedding
                results["own afterwards"] = sum(each.to_local().numel() for each in sharded.parameters())
        torch.save(results, Path(FOLDER, f"{rank}.pt"))


main()
