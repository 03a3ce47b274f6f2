"""What vLLM answers, in its own environment, for test_vllm.py: python vllm_answers.py jobs.json answers.json

A job: {"folder", "prompts" (lists of token ids), "count" (of tokens), "times", "options" (of vllm.LLM), "reload" (a
folder of new weights, loaded behind all else), "write" (a weight that is doubled where it lies, last of all)}. An
answer: {"tokens", "logprobs" (of each prompt's tokens but the first), "length", "reloaded" (the logprobs of the new
weights), "written" (the error of the answer that follows)}, {"vectors"} of a classifier or an embedding model, or
{"error"}.
"""

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any, Dict, List


def room(worker: Any) -> None:
    """For what a pipeline's stage receives. On a CPU vLLM makes it when it compiles, and else forgets it."""
    from vllm.distributed import get_pp_group

    runner = worker.model_runner
    if not get_pp_group().is_first_rank:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


def logprobs(llm: Any, prompts: List[List[int]]) -> List[List[float]]:
    from vllm import SamplingParams, TokensPrompt

    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], scored, use_tqdm=False)
    return [
        [entry[token].logprob for token, entry in zip(ids[1:], out.prompt_logprobs[1:])]
        for ids, out in zip(prompts, outs)
    ]


def answer(job: Dict[str, Any]) -> Dict[str, Any]:
    from vllm import LLM, SamplingParams, TokensPrompt

    options = dict(dtype="float32", enforce_eager=True, enable_prefix_caching=False, max_num_seqs=8, seed=0)
    llm = LLM(job["folder"], **options | {"skip_tokenizer_init": True} | job["options"])
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    if job["options"].get("runner") == "pooling":
        if "Classification" in llm.llm_engine.model_config.architecture:
            return {"vectors": [out.outputs.probs for out in llm.classify(prompts, use_tqdm=False)]}
        return {"vectors": [out.outputs.embedding for out in llm.embed(prompts, use_tqdm=False)]}
    if job["options"].get("pipeline_parallel_size", 1) > 1:
        llm.collective_rpc(room)
    greedy = SamplingParams(temperature=0, max_tokens=job["count"], ignore_eos=True, detokenize=False)
    tokens = []
    for _ in range(job.get("times", 1)):
        tokens += [list(out.outputs[0].token_ids) for out in llm.generate(prompts, greedy, use_tqdm=False)]
    given = {"tokens": tokens, "logprobs": logprobs(llm, job["prompts"])}
    given["length"] = llm.llm_engine.model_config.max_model_len
    if "reload" in job:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": job["reload"]})
        given["reloaded"] = logprobs(llm, job["prompts"])
    if "write" in job:
        weight = llm.apply_model(lambda model: model.get_parameter(job["write"]).detach() * 2)[0]
        options = {"weights_iterator": [(job["write"], weight)], "is_checkpoint_format": False}
        llm.collective_rpc("reload_weights", kwargs=options)
        try:
            logprobs(llm, job["prompts"])
        except RuntimeError as error:
            given["written"] = str(error)
    llm.llm_engine.engine_core.shutdown()
    return given


def import_models() -> None:
    """Into this process. vLLM would start a process for each class, to look at it."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    for name, model in list(ModelRegistry.models.items()):
        if name.startswith("BHyT"):
            ModelRegistry.register_model(name, model.load_model_cls())


def main(jobs: str, answers: str) -> None:
    given, asked = [], json.loads(Path(jobs).read_text())
    if len(asked) > 2:
        import_models()
    for job in asked:
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
