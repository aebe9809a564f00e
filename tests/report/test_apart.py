"""No two runs under one name, and no more words than it takes."""

from evalsuite.core.record import Record
from evalsuite.report.apart import checkpoint_names, names_apart, words_apart
from evalsuite.report.choose import engine_of
from report.record_files import model, speed_record


def run(run_id: str, name: str = "m", **changes: object) -> Record:
    return speed_record(name).model_copy(update={"run_id": run_id, "engaged": {"engine": "vllm"}} | changes)


def test_a_name_of_its_own_stays_as_it_is():
    assert names_apart([run("a"), run("b", "other")]) == {"a": "m", "b": "other"}


def test_what_varies_is_said_and_the_time_only_where_nothing_else_does():
    later = "2026-11-02T00:00:00+00:00"
    runs = [run("a"), run("b", engaged={}), run("c", engaged={}, started=later), run("d", "other")]
    assert names_apart(runs) == {
        "a": "m (vllm)",
        "b": "m (torch, 2026-11-01 00:00:00 UTC)",
        "c": "m (torch, 2026-11-02 00:00:00 UTC)",
        "d": "other",
    }


def test_dtype_and_storage():
    wide = model().model_copy(update={"dtype": "float32"})
    gguf = model(stored="GGUF Q4_1").model_copy(update={"fingerprint": "another"})
    assert names_apart([run("a"), run("b", model=wide), run("c", model=gguf)]) == {
        "a": "m (bfloat16, BF16 safetensors)",
        "b": "m (float32, BF16 safetensors)",
        "c": "m (bfloat16, GGUF Q4_1)",
    }


def test_of_one_checkpoint_what_engines_call_its_storage_is_not_said():
    other = run("b", engaged={"engine": "torch"}, model=model(stored="compressed-tensors safetensors"))
    assert names_apart([run("a"), other]) == {"a": "m (vllm)", "b": "m (torch)"}


def test_checkpoints_of_one_name_are_told_apart_by_their_places():
    def there(run_id: str, place: str, **changes: object) -> Record:
        return run(run_id, spec={**speed_record().spec, "model": place}, **changes)

    assert names_apart([there("a", "./a/m"), there("b", "./b/m"), there("c", "./c/m", engaged={})]) == {
        "a": "m (vllm, ./a/m)",
        "b": "m (vllm, ./b/m)",
        "c": "m (torch)",
    }


def test_two_requests_of_one_second():
    found = words_apart([run("a", spec_hash="1"), run("b", spec_hash="2")], lambda record: "n")
    assert found == {"a": ("request 1",), "b": ("request 2",)}


def test_an_engine_is_read_where_it_was_written():
    assert engine_of(run("a", engaged={})) == "torch"
    assert (
        engine_of(run("a", engaged={}, model=model().model_copy(update={"engaged": {"vllm": "0.32"}})))
        == "vllm"
    )


def test_checkpoints_of_one_name_carry_their_places_and_one_checkpoint_under_two_paths_does_not():
    def there(run_id: str, place: str, fingerprint: str, name: str = "m") -> Record:
        weights = model(name).model_copy(update={"fingerprint": fingerprint})
        return run(run_id, name, spec={**speed_record().spec, "model": place}, model=weights)

    one, same, other = there("a", "./a/m", "1"), there("b", "b/m", "1"), there("c", "./c/m", "2")
    assert checkpoint_names([one, same]) == {"a": "m", "b": "m"}
    assert checkpoint_names([one, other, there("d", "./d", "3", "n")]) == {
        "a": "m (./a/m)",
        "c": "m (./c/m)",
        "d": "n",
    }
