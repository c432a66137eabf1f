"""A queue for batches that were used for estimation and are trained on later."""

import errno
import logging
import shutil
import tempfile
from collections import deque
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

__all__ = ["Spool"]

logger = logging.getLogger(__name__)

_IN_MEMORY = 1 << 28  # bytes
_LEFT_FREE = 1 << 28  # bytes of the disk to leave for others


class Spool:
    """First in, first out: in memory up to 256 MiB, beyond that in a temporary file.

    Batches are returned bit for bit, on their former device. The file has no name and disappears
    with the process.

    Attributes:
        folder: Folder of the file; None: the system's temporary folder (TMPDIR).
        resolution: Machine epsilon of the dtype that the activations were computed in, or 0. With
            that of bfloat16, float32 activations take half the space.
    """

    def __init__(self) -> None:
        self.folder: str | None = None
        self.resolution = 0.0
        # by batch: the tensor (in the file: its shape and dtype), and its former dtype and device
        self._entries: deque[tuple[Any, torch.dtype, torch.device]] = deque()
        self._n_bytes = 0  # in memory
        self._file: IO[bytes] | None = None
        self._read_position = 0

    def __len__(self) -> int:
        return len(self._entries)

    def use_folder(self, folder: str | None) -> None:
        """Set `folder`, unless it is None or was set before.

        Raises:
            NotADirectoryError: There is no such folder.
        """
        if folder is not None and not Path(folder).is_dir():
            raise NotADirectoryError(
                f"WhiteningConfig.temporary_folder={folder!r}: there is no such folder"
            )
        self.folder = self.folder or folder

    def put(self, batch: Tensor) -> None:
        """Keep a batch.

        Raises:
            OSError: The disk has no room for it, or `folder` cannot be written.
        """
        kept = self._narrowed(batch.detach().to("cpu", copy=True).contiguous())
        if self._file is None and self._n_bytes + kept.nbytes <= _IN_MEMORY:
            self._n_bytes += kept.nbytes
            self._entries.append((kept, batch.dtype, batch.device))
            return
        self._write(kept)
        self._entries.append(((kept.shape, kept.dtype), batch.dtype, batch.device))

    def take(self) -> Tensor:
        """The batch that was put in first."""
        kept, dtype, device = self._entries.popleft()
        if isinstance(kept, Tensor):
            self._n_bytes -= kept.nbytes
        else:
            kept = self._read(*kept)
        if not self._entries and self._file is not None:
            self._file.close()
            self._file, self._read_position = None, 0
        return kept.to(device, dtype)

    def _narrowed(self, values: Tensor) -> Tensor:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            if torch.finfo(dtype).eps == self.resolution and dtype.itemsize < values.itemsize:
                narrow = values.to(dtype)
                # a layer may compute in a wider dtype than that of the model
                return narrow if torch.equal(narrow.to(values.dtype), values) else values
        return values

    def _write(self, values: Tensor) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
            logger.info(
                "activations that the whitening is estimated from are kept in a temporary file in "
                "%s until they are trained on",
                self._where(),
            )
        free = shutil.disk_usage(self._where()).free
        if free < values.nbytes + _LEFT_FREE:
            raise OSError(
                errno.ENOSPC,
                f"{self._where()} has only {free / 2**30:.1f} GiB left, after "
                f"{self._file.seek(0, 2) / 2**30:.1f} GiB of activations that the whitening is "
                "estimated from and that are kept there until they are trained on. Set "
                "WhiteningConfig.temporary_folder to a folder with more, or n_samples to fewer",
            )
        self._file.seek(0, 2)
        self._file.write(values.reshape(-1).view(torch.uint8).numpy().data)

    def _read(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        assert self._file is not None
        if shape.numel() == 0:
            return torch.empty(shape, dtype=dtype)
        n_bytes = shape.numel() * dtype.itemsize
        self._file.seek(self._read_position)
        content = bytearray(self._file.read(n_bytes))
        self._read_position += n_bytes
        return torch.frombuffer(content, dtype=dtype).reshape(shape)

    def _where(self) -> Path:
        return Path(self.folder or tempfile.gettempdir())
