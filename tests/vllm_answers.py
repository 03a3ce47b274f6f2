"""What vLLM answers, in its own environment, for test_vllm.py: python vllm_answers.py jobs.json answers.json

A job: {"folder", "prompts" (lists of token ids), "count" (of tokens), "times", "options" (of vllm.LLM)}. An answer:
{"tokens", "logprobs" (of each prompt's tokens but the first), "length"}, {"probabilities"} of a classifier, or {"error"}.
"""

import gc
import json
import sys
import time
from typing import Any, Dict


def answer(job: Dict[str, Any]) -> Dict[str, Any]:
    from vllm import LLM, SamplingParams, TokensPrompt

    options = dict(dtype="float32", enforce_eager=True, enable_prefix_caching=False, max_num_seqs=8, seed=0)
    llm = LLM(job["folder"], skip_tokenizer_init=True, **options | job["options"])
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    if job["options"].get("runner") == "pooling":
        return {"probabilities": [out.outputs.probs for out in llm.classify(prompts, use_tqdm=False)]}
    greedy = SamplingParams(temperature=0, max_tokens=job["count"], ignore_eos=True, detokenize=False)
    tokens = []
    for _ in range(job.get("times", 1)):
        tokens += [list(out.outputs[0].token_ids) for out in llm.generate(prompts, greedy, use_tqdm=False)]
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    logprobs = [
        [entry[token].logprob for token, entry in zip(ids[1:], out.prompt_logprobs[1:])]
        for ids, out in zip(job["prompts"], llm.generate(prompts, scored, use_tqdm=False))
    ]
    length = llm.llm_engine.model_config.max_model_len
    llm.llm_engine.engine_core.shutdown()
    return {"tokens": tokens, "logprobs": logprobs, "length": length}


def main(jobs: str, answers: str) -> None:
    given = []
    with open(jobs) as file:
        for job in json.load(file):
            start = time.perf_counter()
            try:
                given.append(answer(job))
            except Exception as error:
                given.append({"error": str(error)})
            gc.collect()
            seconds = time.perf_counter() - start
            print(f"{seconds:.1f} s: {job['folder']} {given[-1].get('error', '')}", file=sys.stderr, flush=True)
    with open(answers, "w") as file:
        json.dump(given, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
