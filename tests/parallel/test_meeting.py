"""Ranks meet in a part of the store that no earlier start has written to."""

from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

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
