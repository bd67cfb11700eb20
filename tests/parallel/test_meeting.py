"""Ranks meet in a part of the store that no earlier start has written to."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from videodit.parallel import meeting
from videodit.parallel.meeting import fresh_store

SIZE = 3


def test_ranks_that_start_again_do_not_see_what_the_last_start_left() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def arrive(rank: int, start: int) -> list[bytes]:
        client = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
        store = fresh_store(client, rank, SIZE, limit_s=60)
        store.set(f"address/{rank}", f"{start}-{rank}")
        return [store.get(f"address/{other}") for other in range(SIZE)]

    with ThreadPoolExecutor(SIZE) as pool:
        for start in range(5):
            order = [(start + rank) % SIZE for rank in range(SIZE)]
            for found in pool.map(arrive, order, [start] * SIZE):
                assert found == [f"{start}-{rank}".encode() for rank in range(SIZE)]


def test_the_first_rank_says_who_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "PATIENCE_S", 0.0)
    store = dist.HashStore()  # type: ignore[attr-defined]
    with (
        pytest.warns(UserWarning, match=r"ranks \[1, 2\] have not come yet: waiting 0 s at most") as told,
        pytest.raises(RuntimeError, match=r"ranks \[1, 2\] did not come within 0 s"),
    ):
        fresh_store(store, 0, SIZE, limit_s=0.1)
    assert len(told) == 1
