"""Processes find each other through a file, and no file of another launch deceives them."""

import json
import threading
from datetime import timedelta

from hpcmlip import rendezvous
from hpcmlip.errors import RunError

SECONDS = timedelta(seconds=20)


def joined(folder, key, timeout=SECONDS):
    """Rank 1 waits in a thread -> (thread, list that receives its store or its error)."""
    result = []

    def run():
        try:
            result.append(rendezvous.meet(folder, key, rank=1, size=2, timeout=timeout))
        except RunError as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, result


def test_ranks_meet_and_the_file_is_removed(tmp_path):
    thread, result = joined(tmp_path, "job/1")
    store = rendezvous.meet(tmp_path, "job/1", rank=0, size=2, timeout=SECONDS)
    thread.join()
    store.set("word", "hello")
    assert result[0].get("word") == b"hello"
    rendezvous.leave(tmp_path, "job/1")
    assert list(tmp_path.iterdir()) == []


def test_a_stale_file_and_a_port_of_another_job_are_passed_over(tmp_path):
    other = rendezvous.meet(tmp_path, "other", rank=0, size=2, timeout=SECONDS)
    path = rendezvous._path(tmp_path, "mine")
    # as if left by a dead launch with our key, on a port where another job listens by now
    published = json.loads(rendezvous._path(tmp_path, "other").read_text())
    path.write_text(json.dumps(published | {"token": "of the dead launch"}))
    thread, result = joined(tmp_path, "mine")
    thread.join(timeout=1)
    assert thread.is_alive(), "joined a store that does not know the token"
    store = rendezvous.meet(tmp_path, "mine", rank=0, size=2, timeout=SECONDS)
    thread.join()
    store.set("whose", "mine")
    other.set("whose", "other")
    assert result[0].get("whose") == b"mine"


def test_nobody_to_meet_ends_in_a_sentence(tmp_path):
    thread, result = joined(tmp_path, "lonely", timeout=timedelta(seconds=0.5))
    thread.join()
    assert isinstance(result[0], RunError) and "did not find process 0" in str(result[0])


def test_published_addresses_are_no_loopbacks():
    assert not [address for address in rendezvous.addresses() if address.startswith("127.")]
