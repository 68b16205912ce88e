"""Rows, ratios and text of what was measured: arithmetic on plain dicts."""

import statistics

OURS, THEIRS = ("jaxcifar", "jaxcifar_bf16"), ("torch_eager", "torch_best")
_TRAINING = ("step", "epoch")


def rows(work, turns, reports):
    """Return one row (a dict fit for JSON) per kind of work and contender.

    Args:
      work: work.Work. turns, reports: as driver.measure returns them.

    `compare` then adds what follows from several rows.
    """
    found = []
    for kind in work.kinds:
        for contender, report in reports.items():
            row = {"work": work.name(kind), "kind": kind, "model": work.model,
                   "batch": work.batch, "contender": contender}
            if "error" in report:
                found.append({**row, **report})
                continue
            row |= _speed(turns[kind], contender)
            if kind == "eval":
                row["eval_batch"] = work.eval_batch
            if turns.get("peak"):
                row["peak_rate"] = statistics.median(_rates(turns["peak"], contender))
            if kind == "epoch":
                row["epoch_seconds"] = work.num_train / row["images_per_second"]
                row["extrapolated"] = row["images"] < work.num_train - work.batch
            found.append(row | _from_report(kind, report))
    return found


def compare(found):
    """Add to rows of one model and batch size what follows from several of them.

    Ratios are medians over the repeats of a contender's images per second, or (on CPU) per CPU
    second, divided by PyTorch's in the same turn. A multiply-add is two operations; the share is
    of the fastest matrix product of that dtype that any contender computed. An epoch's row gets the
    share of augmentation alone.
    """
    measured = [row for row in found if "error" not in row]
    counts = next((row for row in measured if "training_multiply_adds" in row), None)
    peaks = {}
    for row in measured:
        if "peak_rate" in row:
            peaks[row["dtype"]] = max(row["peak_rate"], peaks.get(row["dtype"], 0.0))
    for row in measured:
        same = {other["contender"]: other for other in measured if other["kind"] == row["kind"]}
        row["ratio"] = _ratios(row, same, "images_per_second_all")
        on_cpu = row["environment"]["device"] == "cpu"  # elsewhere it is mostly time in waiting
        row["ratio_by_cpu_time"] = _ratios(row, same, "images_per_cpu_second_all") if on_cpu else {}
        if counts and row["kind"] != "augment" and row["dtype"] in peaks:
            row |= _share(row, counts, peaks[row["dtype"]])
    _augmentation_shares(found)


def _from_report(kind, report):
    row = {key: report[key] for key in ("dtype", "variant", "peak_host_bytes", "peak_device_bytes",
                                        "loss", "environment")}
    # The first call of a program compiles it, and does what every call does; steps and epochs are
    # the same program.
    kinds = _TRAINING if kind in _TRAINING else (kind,)
    first, warm = report["first_seconds"], report["warm_seconds"]
    before = report.get("compile_seconds", {}).get(kind, 0.0)
    row["compile_seconds"] = before + max(
        0.0, *(first[name] - warm[name] for name in kinds if name in first))
    if "multiply_adds" in report:
        row |= {"multiply_adds": report["multiply_adds"],
                "training_multiply_adds": report["training"]}
    return row


def _share(row, counts, peak):
    training = row["kind"] in _TRAINING
    flops = 2 * counts["training_multiply_adds" if training else "multiply_adds"]
    return {"multiply_adds": counts["multiply_adds"], "peak_flops": peak,
            "share_of_peak": flops * row["images_per_second"] / peak}


def _rates(turns, contender, clock="seconds"):
    return [turn[contender]["images"] / turn[contender][clock] for turn in turns]


def _speed(turns, contender):
    measured = [turn[contender] for turn in turns]
    return {"images_per_second": statistics.median(_rates(turns, contender)),
            "images_per_second_all": _rates(turns, contender),
            "images_per_cpu_second_all": _rates(turns, contender, "cpu_seconds"),
            "cpu_seconds_per_image": statistics.median(
                m["cpu_seconds"] / m["images"] for m in measured),
            "images": measured[0]["images"]}


def _ratios(row, same, key):
    """Return {PyTorch's contender: median over turns of our rate over its}, for ours only."""
    if row["contender"] not in OURS:
        return {}
    return {other: statistics.median(
        ours / theirs for ours, theirs in zip(row[key], same[other][key], strict=True))
        for other in THEIRS if other in same}


def _augmentation_shares(found):
    """Give every row of an epoch the share of augmentation alone, where that was measured."""
    for row in found:
        alone = [r for r in found if r["kind"] == "augment" and r["contender"] == row["contender"]
                 and "error" not in r]
        if row["kind"] == "epoch" and alone and "error" not in row:
            row["augmentation_share"] = (row["images_per_second"]
                                         / alone[0]["images_per_second"])


LEGEND = """\
images/s: median of the repeats; x: our speed over PyTorch's eager and best, median over the turns;
cpu x: on CPU, the same by CPU time of all threads (steadier on a shared machine; with --threads=1
no time is lost in threads that wait); compile s: the first call less a warm one, and what was
compiled before it, which a cache may have shortened where the row says "caches"; MB: peak memory
(of a GPU, ours with what XLA takes to try kernels, unless a cache has them); MMACs: millions of
multiply-adds of one forward pass; peak %: of the speed of a large matrix product, a training image
being three forward passes, less the first layer's gradient of images."""
_COLUMNS = (("work", 24), ("contender", 13), ("images/s", 10), ("x eager", 8), ("x best", 7),
            ("cpu x eager", 12), ("cpu x best", 11), ("compile s", 9), ("host MB", 8),
            ("device MB", 10), ("MMACs", 8), ("peak %", 7))


def text(found, header=True):
    """Return rows as a table; `x` columns: our speed over PyTorch's, `cpu x`: by CPU time."""
    lines = [_line([name for name, _ in _COLUMNS])] if header else []
    for row in found:
        if "error" in row:
            lines.append(f"{row['work']:<24} {row['contender']:<13} {row['error']}")
            continue
        lines.append(_line([
            row["work"], row["contender"], _number(row["images_per_second"]),
            *(_number(row[which].get(other)) for which in ("ratio", "ratio_by_cpu_time")
              for other in THEIRS),
            f"{row['compile_seconds']:.1f}", _megabytes(row["peak_host_bytes"]),
            _megabytes(row["peak_device_bytes"]),
            _number(row.get("multiply_adds", 0) / 1e6 or None),
            _number(row.get("share_of_peak") and 100 * row["share_of_peak"])]) + _remark(row))
    return "\n".join(lines)


def _line(cells):
    return " ".join(f"{cell:<{width}}" if i < 2 else f"{cell:>{width}}"
                    for i, (cell, (_, width)) in enumerate(zip(cells, _COLUMNS, strict=True)))


def _remark(row):
    parts = [row["variant"]]
    if "eval_batch" in row:
        parts.append(f"batches of {row['eval_batch']:,}")
    if "epoch_seconds" in row:
        how = f" (extrapolated from {row['images']:,} images)" if row["extrapolated"] else ""
        parts.append(f"epoch {row['epoch_seconds']:,.1f} s{how}")
    if "augmentation_share" in row:
        parts.append(f"augmentation {100 * row['augmentation_share']:.0f}%")
    if row.get("caches"):
        parts.append("caches")
    return "  " + "; ".join(parts)


def _number(value):
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _megabytes(count):
    return "-" if count is None else f"{count / 1e6:,.0f}"


def summary(found):
    """Return lines with the median and the range of our ratios over steps and epochs."""
    lines = []
    for ours in OURS:
        for key, label in (("ratio", "by time"), ("ratio_by_cpu_time", "by CPU time")):
            for other in THEIRS:
                values = [row[key][other] for row in found
                          if row["contender"] == ours and row["kind"] in _TRAINING
                          and other in row.get(key, {})]
                if values:
                    lines.append(f"{ours} over {other}, {label}: median "
                                 f"{statistics.median(values):.2f}, {min(values):.2f} to "
                                 f"{max(values):.2f} (steps and epochs: {len(values)})")
    return "\n".join(lines)
