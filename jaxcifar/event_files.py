"""Write scalars to TensorBoard event files, without TensorFlow and without a library.

An event file is a sequence of records (length, checksum, bytes, checksum: TensorFlow's "TFRecord"
framing), each holding one `Event` protocol buffer. Scalars need six fields of three messages,
encoded here by hand: tensorboardX imports torch (2 s) where torch is installed, and tensorboard's
own writer imports TensorFlow where that is installed.
"""

import pathlib
import struct

_CRC32C_POLYNOMIAL = 0x82F63B78  # Castagnoli, bit-reversed
_FLOAT32_MAX = 3.4028234663852886e38
_SESSION_START = b"\x08\x01"  # SessionLog.status (field 1, varint) = START


def _crc32c_table():
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (_CRC32C_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


_TABLE = _crc32c_table()


def crc32c(data):
    """Return the CRC-32C checksum of `data` (bytes), an int below 2**32 (RFC 3720, B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _masked_crc(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _record(data):
    length = struct.pack("<Q", len(data))
    return b"".join((
        length, struct.pack("<I", _masked_crc(length)), data, struct.pack("<I", _masked_crc(data))))


def _varint(value):
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _field(number, data):
    """A length-delimited protocol buffer field (wire type 2)."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _float32(value):
    """Four bytes; beyond float32's range the largest, where struct would raise."""
    return struct.pack("<f", min(max(value, -_FLOAT32_MAX), _FLOAT32_MAX))


def _event(wall_time, step, body):
    """An `Event`: wall_time (field 1, double), step (field 2, int64) and a payload field."""
    return b"\x09" + struct.pack("<d", wall_time) + b"\x10" + _varint(step) + body


class EventFile:
    """One event file, open for appending; a new one for every start of a run."""

    def __init__(self, folder, *, wall_time, purge_step):
        """Create the next event file in `folder`.

        wall_time: seconds since 1970. purge_step: int >= 0; TensorBoard hides what earlier files of
        the folder hold at this step and after it, so that a resumed run shows every step once.
        Raises OSError.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names; two starts may share a second.
        count = len(list(folder.glob("events.out.tfevents.*")))
        self.path = folder / f"events.out.tfevents.{int(wall_time):010d}.{count:04d}"
        self._file = self.path.open("xb", buffering=0)
        version = _event(wall_time, 0, _field(3, b"brain.Event:2"))
        purge = _event(wall_time, purge_step, _field(7, _SESSION_START))
        self._file.write(_record(version) + _record(purge))

    def scalars(self, step, values, *, wall_time):
        """Append `values`, a mapping tag -> float, at `step` (int >= 0). Raises OSError."""
        summary = b"".join(
            _field(1, _field(1, tag.encode()) + b"\x15" + _float32(value))
            for tag, value in values.items())
        self._file.write(_record(_event(wall_time, step, _field(5, summary))))

    def close(self):
        """Close the file."""
        self._file.close()
