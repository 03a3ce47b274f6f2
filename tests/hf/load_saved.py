"""Fresh processes that load every saved model in a folder as users' tools do: see test_hf_loading.py.

    load_saved.py FOLDER

Each is a fork of this one, which has imported transformers and nothing of bhyt: "import" imports bhyt.hf, "trust" says
trust_remote_code, "neither" does not. Writes FOLDER/HOW.pt: {case: what the model gave, or the error}, and everything
that was logged or warned of.
"""

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, Dict

import torch
import transformers
import transformers.modeling_utils  # else each fork does: seconds

AUTO = {"causal": "AutoModelForCausalLM", "body": "AutoModel", "classifier": "AutoModelForSequenceClassification"}


def outputs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(ids)
    return result.last_hidden_state if hasattr(result, "last_hidden_state") else result.logits


def load_all(folder: Path, how: str) -> None:
    if how == "import":
        import bhyt.hf  # noqa: F401
    trust = {"trust_remote_code": True} if how == "trust" else {}
    said = []
    warnings.showwarning = lambda message, *_, **__: said.append(str(message))
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    ids = torch.load(folder / "ids.pt")
    results: Dict[str, Any] = {}
    for case, options in json.loads((folder / "cases.json").read_text()).items():
        path, kind, load = folder / options["path"], options["kind"], dict(options["load"])
        if load.pop("dtype", None):
            load["torch_dtype" if transformers.__version__ < "5" else "dtype"] = torch.bfloat16
        before = len(said)
        try:
            if kind == "pipeline":
                pipe = transformers.pipeline("text-generation", model=str(path), device="cpu", **trust)
                results[case] = pipe("w1 w2 w3", max_new_tokens=8, do_sample=False)[0]["generated_text"]
            else:
                model = getattr(transformers, AUTO[kind]).from_pretrained(path, **trust, **load)
                results[case] = type(model).__name__, outputs(model, ids), model.state_dict()
        except Exception as error:
            results[case] = f"{type(error).__name__}: {error}"
        results[f"{case} said"] = said[before:]
    results["modules"] = [name for name in sys.modules if name.split(".")[0] == "bhyt"]
    torch.save(results, folder / f"{how}.pt")


def main(folder: Path) -> None:
    for how in ("neither", "import", "trust"):
        if os.fork() == 0:
            return load_all(folder, how)
        if os.wait()[1] != 0:
            sys.exit(f"{how}: failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
