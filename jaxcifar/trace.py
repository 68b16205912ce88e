"""Read a trace of jax.profiler: what each operation of a compiled program took, without TensorFlow.

On a GPU every kernel is an event on a stream of the plane /device:GPU:N, with the operation that it
belongs to as the stat hlo_op. On CPU operations run on threads of the plane /host:CPU: an event
with the stat hlo_op says when one started, an event "end: NAME" on whatever thread when it ended.
Where an operation comes from (layer2.0/conv1, backward) is not in the trace but in the program's
text, whose op_name is JAX's name stack.
"""

import collections
import dataclasses
import re

from jaxcifar.errors import UserError

_DEVICE = re.compile(r"/device:(GPU|TPU):\d+")
_HOST = "/host:CPU"
_LINES = ("Stream", "XLA Ops")  # of GPUs, of TPUs; all others repeat their time: take one kind
_END = "end: "
_REASONS = {"gpu": (
    "CUPTI recorded no kernel, and what the host took to launch them is not their time; its error "
    "is among the lines above (CUPTI_ERROR_INSUFFICIENT_PRIVILEGES: run as root, or load the driver "
    "with NVreg_RestrictProfilingToAdminUsers=0)")}
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*)")
_CONTAINER = re.compile(r" (?:while|conditional|call)\(")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_FUSED = re.compile(r" fusion\(.*calls=%?([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_NOT_A_PLACE = re.compile(r"\w+\(.*\)|body|cond|while|closed_call|branch_\d+_fun|checkpoint"
                          r"|rematted_computation|shard_map|eval_jaxpr")


@dataclasses.dataclass(frozen=True)
class Span:
    """One execution of an operation on a device, in nanoseconds; kernel: its name on a GPU."""

    name: str
    start: float
    stop: float
    kernel: str = ""


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a program: its HLO name, its place in the model, executions, nanoseconds."""

    name: str
    op_name: str
    count: float
    ns: float


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a trace says, as the mean of its devices.

    operations: most expensive first. busy_ns, total_ns: from the first operation to the last.
    between_ns: idle while the host went from one call to the next, one number per change of calls;
    0 where the device was seen busy then.
    num_devices: int.
    """

    operations: list
    busy_ns: float
    total_ns: float
    between_ns: list
    num_devices: int


def read(planes, text, call, backend):
    """Return the Profile of a trace.

    Args:
      planes: of jax.profiler.ProfileData, or anything with the same attributes. text: the traced
        program's optimised HLO; "" where it is not known. call: name of the host's annotation that
        encloses the start of every call. backend: "cpu", "gpu" or "tpu", JAX's.

    Raises:
      UserError: the trace has no operation of the backend's devices.
    """
    planes = list(planes)
    places, containers = instructions(text)
    devices = [resolved(spans, places) for spans in device_spans(planes, backend).values()]
    if not devices:
        raise UserError(f"the trace holds no operation of the {backend}: " + _REASONS.get(
            backend, "this version of JAX writes it in another form; open it in Perfetto"))
    starts = sorted(event.start_ns for plane in planes if plane.name == _HOST
                    for line in plane.lines for event in line.events if event.name == call)
    time, count, busy, total, between = collections.Counter(), collections.Counter(), 0, 0, []
    for spans in devices:
        own, gaps = own_times(spans, containers)
        time.update(own)
        count.update(span.name for span in spans)
        busy += sum(own.values())
        total += max(s.stop for s in spans) - min(s.start for s in spans)
        between += [next((stop - start for start, stop in gaps if start <= moment <= stop), 0)
                    for moment in starts[1:]]
    n = len(devices)
    operations = [Operation(name, places.get(name, ""), count[name] / n, ns / n)
                  for name, ns in time.most_common()]
    return Profile(operations, busy / n, total / n, between, n)


def device_spans(planes, backend):
    """Return {device: list of Span} of a trace's planes.

    The host's operations are those of CPU devices; beside an accelerator they launch its kernels,
    and how long they take says nothing about these.
    """
    found = {}
    for plane in planes:
        if backend == "cpu" and plane.name == _HOST:
            found |= _host_spans(plane)
        elif backend != "cpu" and _DEVICE.fullmatch(plane.name):
            kinds = ([_kernel(event) for line in plane.lines if line.name.startswith(kind)
                      for event in line.events] for kind in _LINES)
            if spans := next(filter(None, kinds), None):
                found[plane.name] = spans
    return found


def _kernel(event):
    name = dict(event.stats).get("hlo_op") or event.name.split(" = ")[0].lstrip("%")
    return Span(name, event.start_ns, event.start_ns + event.duration_ns, event.name)


def _host_spans(plane):
    """Return {device: spans}; an operation lasts until its end was seen, on whatever thread."""
    begun, ends = [], {}
    for line in plane.lines:
        for event in line.events:
            stats = dict(event.stats)
            if event.name.startswith(_END):
                ends[stats.get("_c")] = event.start_ns
            elif "hlo_op" in stats:
                begun.append((event, stats))
    found = collections.defaultdict(list)
    for event, stats in begun:
        stop = max(event.start_ns + event.duration_ns, ends.get(stats.get("_p"), 0))
        found[stats.get("device_ordinal", 0)].append(Span(stats["hlo_op"], event.start_ns, stop))
    return dict(found)


def parsed(text):
    """Yield (computation, name, what is right of "=") for every instruction of HLO text, in order."""
    computation = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        elif match := _INSTRUCTION.match(line):
            yield computation, *match.groups()


def instructions(text):
    """Return ({HLO name: op_name, maybe ""}, names of the loops, branches and calls) of HLO text.

    A fusion without an op_name of its own has that of an instruction in it.
    """
    places, containers, inside = {}, set(), {}
    for computation, name, rest in parsed(text):
        op_name, fused = _OP_NAME.search(rest), _FUSED.search(rest)
        place = op_name[1] if op_name else inside.get(fused[1], "") if fused else ""
        places[name] = place
        if place:
            inside[computation] = place  # of the last one, nearest to the result
        if _CONTAINER.search(rest):
            containers.add(name)
    return places, containers


def resolved(spans, places):
    """Return spans named by their instruction where only the kernel's name says which it is.

    Kernels of a CUDA graph belong to one hlo_op, the graph ("command_buffer", "call"); a kernel's
    own name is that of its instruction with _ for . and -.
    """
    kernels = {re.sub(r"\W", "_", name): name for name in places}

    def unclear(span):
        return span.kernel and (span.name.startswith(("command_buffer", "call"))
                                or places and span.name not in places)

    return [dataclasses.replace(span, name=kernels.get(span.kernel, span.kernel))
            if unclear(span) else span for span in spans]


def own_times(spans, containers):
    """Share a device's time among its operations.

    Every moment belongs to the operations that run then, in equal parts; to a loop, branch or call
    (the names in `containers`) only while nothing else runs, and to the innermost of these. So no
    moment counts twice, whatever is nested or runs side by side.

    Returns:
      ({name: ns}, idle times [(start, stop)] between the first operation and the last).
    """
    lasting = [(i, span) for i, span in enumerate(spans) if span.stop > span.start]
    moments = sorted([(span.start, 1, i) for i, span in lasting]
                     + [(span.stop, 0, i) for i, span in lasting])
    working, around = set(), {}  # dicts keep the order in which containers began
    own, gaps, last = collections.Counter(), [], moments[0][0] if moments else 0
    for moment, starts, i in moments:
        lapse = moment - last
        owners = working or list(around)[-1:]
        for owner in owners if lapse else ():
            own[spans[owner].name] += lapse / len(owners)
        if lapse and not owners:
            gaps.append((last, moment))
        last = moment
        if spans[i].name in containers:
            if starts:
                around[i] = None
            else:
                around.pop(i, None)
        elif starts:
            working.add(i)
        else:
            working.discard(i)
    return own, gaps


def place(op_name):
    """Return where an operation comes from, in short: "layer2.0/conv1/dot_general, backward".

    op_name: JAX's name stack, such as "jit(train_steps)/transpose(jvp(ResNet))/layer2.0/...".
    """
    *path, primitive = op_name.split("/")
    path = [part for part in path if part and not _NOT_A_PLACE.fullmatch(part)]
    if path and path[0][0].isupper():  # the model's class, which training has in jvp(...)
        del path[0]
    return "/".join([*path, primitive]) + (", backward" if phase(op_name) == "backward" else "")


def phase(op_name):
    """Return "forward" or "backward" for an operation of the model in training, else "other"."""
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "other"
