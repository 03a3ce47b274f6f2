"""The tables of docs/quantization-results.md, for readme_table.py."""

from table_text import Result, caption, markdown, number


def quantized(result: Result) -> list[str]:
    """Tokens/s of whole models relative to the baseline; then int8 and float8 ops over the unquantised ones."""
    baseline, problems = result["baseline"], result["problems"]
    env = result["environment"]
    state = f"torchao {env['torchao']}, transformers {env['transformers']}; "
    state += f"load average {env['load_before']} before the run."
    speeds = [{each: t["tokens_per_s"] for each, t in p["providers"].items()} for p in problems]
    names = {name: None for p in problems for name in (*p["providers"], *p["failed"])}  # in order, once each
    cells = [[f"{baseline}, tokens/s", *(number(own[baseline]) for own in speeds)]]
    for name in names:
        cells.append([name, *(f"{own[name] / own[baseline]:.2f}" if name in own else "failed" for own in speeds)])
    shape = "{num_hidden_layers} layers, d = {hidden_size}".format(**result["preset"]["config"])
    lines = [caption(result), state, "", f"Whole models, {shape}; tokens/s over {baseline}:", ""]
    lines += markdown([f"over {baseline}", *(f"{p['task']} {p['mode']}" for p in problems)], cells)
    ops = {f"{p['op']}": None for p in result["ops"]}
    lines += ["", "Ops, times faster than the same op with y in the rows' dtype:", ""]
    rows = []
    for size in {(p["rows"], p["d"]): None for p in result["ops"]}:
        for dtype in {p["dtype"]: None for p in result["ops"]}:
            chosen = [p for p in result["ops"] if (p["rows"], p["d"], p["dtype"]) == (*size, dtype)]
            found = {p["op"]: p["providers"] for p in chosen}
            ratios = [f"{found[op]['bhyt']['us'] / found[op][to]['us']:.2f}" for op in ops for to in ("int8", "float8")]
            rows.append([f"{size[0]} x {size[1]}", dtype, *ratios])
    titles = [f"`{op}` {to}" for op in ops for to in ("int8", "float8")]
    return [*lines, *markdown(["rows x d", "from", *titles], rows, left=2)]


def quantized_accuracy(result: Result) -> list[str]:
    """Held-out loss of the float model, and what each way of eight bits adds to it."""
    records = result["records"]
    ways = {way: None for r in records for way in r["losses"] if way != "float"}
    shape = "{layers} layers, d = {dim}".format(**result["model"])
    cells = []
    for r in records:
        own = r["losses"]
        where = "-" if r["where"] == "none" else f"{r['times']}x, {r['where']}"
        added = [f"{own[way] - own['float']:+.4f}" if way in own else "-" for way in ways]
        cells.append([r["norm"], where, f"{own['float']:.4f}", *added])
    work = f"{shape}; {result['text']}, {result['tokens']:,} held-out tokens; nats per token."
    lines = [caption(result), work, ""]
    return lines + markdown(["norm", "outlier channel", "float", *ways], cells, left=2)


def quantized_profile(result: Result) -> list[str]:
    """CPU time of an eager decoding step, with parts of it taken away, and of a compiled prefill without products."""
    cells = [[title, f"{ms:.2f}"] for title, ms in result["cpu_ms_per_token"].items()]
    shape = "{num_hidden_layers} layers, d = {hidden_size}".format(**result["preset"]["config"])
    lines = [caption(result), "", *markdown([f"an eager decoding step, {shape}", "CPU time, ms"], cells)]
    cells = [[f"{name}, without its products", f"{ms:.1f}"] for name, ms in result["cpu_ms_per_prefill"].items()]
    return lines + ["", *markdown([f"a compiled prefill of {result['tokens']} tokens", "CPU time, ms"], cells)]
