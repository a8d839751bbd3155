"""Continue a prompt.

    python sample.py --ckpt=out/babyllama --prompt="Once upon a time" --length=100
    python sample.py --ckpt=out/babyllama     # reads prompts, a line each, until Ctrl-D
"""
import sys
from dataclasses import dataclass
from typing import Literal

import torch

from distill import Teacher, mean_logits
from lib.checkpoints import load_ensemble
from lib.configurator import launch
from lib.data import Batch
from lib.machine import pick_device


@dataclass
class SampleConfig:
    ckpt: tuple[str, ...] = ()  # run (its best checkpoint) or checkpoint folder; several: their ensemble
    prompt: str = ""            # '' = ask for prompts
    length: int = 100           # tokens to add
    temperature: float = 0.8    # 0 = always the likeliest token
    top_k: int = 50             # choose among this many; 0 = all
    seed: int = 1
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


def main(cfg):
    if not cfg.ckpt:
        sys.exit("error: say which model: --ckpt=out/run")
    models, tokenizer, described = load_ensemble(cfg.ckpt, pick_device(cfg.device))
    sys.stdout.reconfigure(errors="replace")  # for terminals that are not UTF-8
    for i, prompt in enumerate([cfg.prompt] if cfg.prompt else typed_prompts()):
        ids = tokenizer.encode(prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
        if described["bos"] != "none" and tokenizer.bos is not None:
            ids = [tokenizer.bos] + ids
        ids = ids or [first_token(tokenizer)]  # of a model trained without <s>: only as a last resort
        ids = generate(models, ids, cfg.length, cfg.temperature, cfg.top_k, cfg.seed + i,
                       tokenizer.vocab_size)
        print(tokenizer.decode(ids), flush=True)


def typed_prompts():
    """Lines of standard input; an empty one asks for text from nothing."""
    while True:
        try:
            yield input("\nprompt> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return


def first_token(tokenizer):
    """What text from nothing begins after."""
    return tokenizer.bos if tokenizer.bos is not None else 0


@torch.no_grad()
def generate(models, ids, length, temperature=1.0, top_k=0, seed=1, vocab_size=None):
    """`ids` (a list, at least one) and `length` sampled tokens more, from the models' averaged logits.
    The context is the last block_size tokens. vocab_size: how many tokens there are, if fewer than the models
    have logits (an imported one's may be padded)."""
    teachers, device = [Teacher(m) for m in models], next(models[0].parameters()).device
    generator = torch.Generator().manual_seed(seed)
    block_size = min(m.cfg.block_size for m in models)
    ids = list(ids)
    for _ in range(length):
        batch = Batch(torch.tensor([ids[-block_size:]], device=device))
        z = mean_logits(teachers, [teacher.states(batch)[:, -1] for teacher in teachers])[0].cpu()  # (V,)
        z = z[:vocab_size]
        if temperature == 0:
            ids.append(z.argmax().item())
            continue
        if top_k:
            z[z < z.topk(min(top_k, len(z))).values[-1]] = -torch.inf
        p = torch.softmax((z - z.max()).double() / temperature, 0)
        ids.append(torch.multinomial(p, 1, generator=generator).item())
    return ids


if __name__ == "__main__":
    launch(main, SampleConfig)
