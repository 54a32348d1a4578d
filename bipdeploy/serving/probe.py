"""Load a checkpoint in one engine and say what it generates: a program of its own.

    python -P probe.py < request.json

It imports nothing of bipdeploy unless the request says so, and can make sure that nothing else
does either: this is how a checkpoint is shown to work where bipdeploy is not installed. The
request is a JSON object with these fields (see `exporters/portability.py`, which writes it):

`engine` "transformers" or "vllm"; `folder`; `prompts` and `continuations`, lists of token ids;
`new_tokens`; `dtype`; `device`; `bipdeploy` true to register its classes, false to refuse the
import; `trust_remote_code`; `options` for vLLM's `LLM`; `out`, the file for the answer.

The answer holds `tokens` (greedy, by prompt), `logprobs` and `margins` (of these tokens, and how
far the second choice is behind; natural logarithms), and `scored`: the log-probability of every
token of the given continuations.
"""

import json
import sys
from pathlib import Path


class _Refused:
    """An import finder that makes a package look as if it were not installed."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def in_transformers(request):
    import torch
    from transformers import AutoModelForCausalLM

    if request["bipdeploy"]:
        from bipdeploy.model import loading

        loading.register()
    model = AutoModelForCausalLM.from_pretrained(
        request["folder"], dtype=getattr(torch, request["dtype"]),
        trust_remote_code=request["trust_remote_code"]).to(request["device"]).eval()
    tokens, logprobs, margins, scored = [], [], [], []
    with torch.inference_mode():
        for prompt in request["prompts"]:
            ids, cache, chosen = torch.tensor([prompt], device=request["device"]), None, []
            for _ in range(request["new_tokens"]):
                out = model(ids, past_key_values=cache, use_cache=True)
                best = out.logits[0, -1].float().log_softmax(-1).topk(2)
                chosen.append((int(best.indices[0]), float(best.values[0]),
                               float(best.values[0] - best.values[1])))
                ids, cache = best.indices[:1][None], out.past_key_values
            tokens.append([token for token, _, _ in chosen])
            logprobs.append([logprob for _, logprob, _ in chosen])
            margins.append([margin for _, _, margin in chosen])
        for prompt, rest in zip(request["prompts"], request["continuations"], strict=False):
            ids = torch.tensor([prompt + rest], device=request["device"])
            found = model(ids).logits[0].float().log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(rest) - 1)
            scored.append([float(found[at, token])
                           for at, token in zip(places, rest, strict=True)])
    return {"class": type(model).__name__, "tokens": tokens, "logprobs": logprobs,
            "margins": margins, "scored": scored}


def in_vllm(request):
    from vllm import LLM, SamplingParams

    llm = LLM(request["folder"], dtype=request["dtype"], seed=0,
              trust_remote_code=request["trust_remote_code"], **request["options"])
    tokens, logprobs, scored = [], [], []
    greedy = SamplingParams(temperature=0, max_tokens=request["new_tokens"], ignore_eos=True,
                            logprobs=1, detokenize=False)
    for done in llm.generate([{"prompt_token_ids": p} for p in request["prompts"]], greedy,
                             use_tqdm=False):
        chosen = done.outputs[0]
        tokens.append(list(chosen.token_ids))
        logprobs.append([step[token].logprob for token, step
                         in zip(chosen.token_ids, chosen.logprobs, strict=True)])
    score = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=0,
                           detokenize=False)
    pairs = list(zip(request["prompts"], request["continuations"], strict=True))
    for (prompt, rest), done in zip(pairs, llm.generate(
            [{"prompt_token_ids": p + r} for p, r in pairs], score, use_tqdm=False), strict=True):
        steps = done.prompt_logprobs[len(prompt):]
        scored.append([step[token].logprob for token, step in zip(rest, steps, strict=True)])
    return {"class": llm.llm_engine.model_config.architecture, "tokens": tokens,
            "logprobs": logprobs, "scored": scored}


def main():
    request = json.loads(sys.stdin.read())
    if not request["bipdeploy"]:
        sys.meta_path.insert(0, _Refused("bipdeploy"))
    answer = {"transformers": in_transformers, "vllm": in_vllm}[request["engine"]](request)
    Path(request["out"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
