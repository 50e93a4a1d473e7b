"""The ternary functions of a door, as a runner of the self-check; a part of :class:`doors.Door`."""

from __future__ import annotations

from typing import Any

from pydist import Ternary


class TernaryDoor:
    """selfcheck.TernaryRunner through ``call`` and ``_place`` of a door."""

    def _read(self, function: str, placed: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a function of arrays that it must leave alone; result and flags."""
        arrays = {name: self._place(name, x) for name, x in placed.items()}  # type: ignore[attr-defined]
        flags, native_flags = self._flags()  # type: ignore[attr-defined]
        natives = [native for _, native in arrays.values()]
        segments = self.native(kwargs.pop("segments"))  # type: ignore[attr-defined]
        result = self.call(  # type: ignore[attr-defined]
            function, *natives, *args, **kwargs, flags=native_flags, segments=segments
        )
        for array, _ in arrays.values():
            array.unchanged()
        return result, self._raised(flags)  # type: ignore[attr-defined]

    def ternary_scale(self, x: Any, clip: Any, segments: Any) -> Any:
        return self._read("ternary_scale", {"x": x}, Ternary(clip), segments=segments)

    def ternary_pack(self, x: Any, scalers: Any, shared: Any, options: Any, segments: Any) -> Any:
        kept, native = self._place("shared", shared)  # type: ignore[attr-defined]
        result = self._read(
            "ternary_pack", {"x": x, "scalers": scalers}, shared=native,
            seed=options.seed, rank=options.rank, step=options.step, segments=segments,
        )  # fmt: skip
        kept.unchanged()
        return result

    def ternary_sum(self, payloads: Any, n: int, segments: Any) -> Any:
        return self._read("ternary_sum", {"payloads": payloads}, n, segments=segments)

    def ternary_unpack(
        self, payloads: Any, scalers: Any, n: int, *, mean: bool, storage: str, segments: Any
    ) -> Any:
        return self._read(
            "ternary_unpack", {"payloads": payloads, "scalers": scalers}, n,
            mean=mean, dtype=self._dtype(storage), segments=segments,  # type: ignore[attr-defined]
        )  # fmt: skip

    def ternary_unpack_sums(
        self,
        sums: Any,
        scalers: Any,
        n: int,
        *,
        ranks: int,
        mean: bool,
        storage: str,
        segments: Any,
    ) -> Any:
        return self._read(
            "ternary_unpack_sums", {"sums": sums, "scalers": scalers}, n, ranks=ranks,
            mean=mean, dtype=self._dtype(storage), segments=segments,  # type: ignore[attr-defined]
        )  # fmt: skip
