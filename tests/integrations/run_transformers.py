"""Transformers: the mixin against a plain Trainer, resuming, votes, and adapters of PEFT."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import peft
import torch
import torch.distributed as dist
import transformers
from common import checksum, say
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import pydist
from pydist.integrations.transformers import CompressMixin

transformers.logging.set_verbosity_error()


def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        )  # fmt: skip
    )


def sentences() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 128, (64, 32), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


class Signs(CompressMixin, Trainer):
    codec, options = pydist.Sign("l1"), {"exclude": ["*norm*"]}


class Lossless(CompressMixin, Trainer):
    codec = pydist.Raw()


class Votes(CompressMixin, Trainer):
    """Without a codec the optimizer votes."""


class Adapters(CompressMixin, Trainer):
    codec, options = pydist.QSGD(bits=4), {"min_numel": 64}


def trained(kind: Any, folder: str, start: Any = None, net: Any = None, **options: Any) -> Any:
    """Eight steps; checkpoints after four and eight."""
    rest = options.pop("trainer", {})
    arguments = TrainingArguments(
        **{
            "output_dir": folder, "per_device_train_batch_size": 4, "max_steps": 8,
            "gradient_accumulation_steps": 2, "save_steps": 4, "logging_steps": 4,
            "report_to": [], "use_cpu": True, "lr_scheduler_type": "constant",
            "disable_tqdm": True, "ddp_find_unused_parameters": False, "seed": 0, **options,
        }
    )  # fmt: skip
    trainer = kind(net or model(), arguments, train_dataset=sentences(), **rest)
    trainer.train(resume_from_checkpoint=start) if start else trainer.train()
    dist.barrier()
    return checksum(trainer.model), trainer


def main(folder: str) -> None:
    plain, _ = trained(Trainer, f"{folder}/plain")
    raw, _ = trained(Lossless, f"{folder}/raw")
    through, trainer = trained(Signs, f"{folder}/signs")
    ratio = trainer.compression.state.stats()["ratio"]
    logged = any("pydist_ratio" in entry for entry in trainer.state.log_history)
    resumed, _ = trained(Signs, f"{folder}/signs", f"{folder}/signs/checkpoint-4")
    lion = {
        "max_grad_norm": 0.0,
        "trainer": {"optimizer_cls_and_kwargs": (pydist.optim.DistributedLion, {"lr": 1e-3})},
    }
    votes, trainer = trained(Votes, f"{folder}/votes", **lion)
    votes_ratio = trainer.optimizer.optimizer.stats()["ratio"]
    votes_resumed, _ = trained(Votes, f"{folder}/votes", f"{folder}/votes/checkpoint-4", **lion)
    net = peft.get_peft_model(model(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with warnings.catch_warnings(record=True):
        _, trainer = trained(Adapters, f"{folder}/peft", net=net)
    say(
        version=transformers.__version__, peft=peft.__version__, plain=plain, raw=raw,
        through=through, resumed=resumed, lion=votes, lion_resumed=votes_resumed, ratio=ratio,
        lion_ratio=votes_ratio, logged=logged,
        adapters=trainer.compression.state.stats()["ratio"],
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
