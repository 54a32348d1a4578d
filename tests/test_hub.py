"""Models from the hub: what is fetched, what is tried again, and the line for each thing that goes
wrong. huggingface_hub itself asks a server on this machine."""

from __future__ import annotations

import errno
import socket
import subprocess
import time

import pytest
from datasets import load_dataset
from huggingface_hub import constants

from bipdeploy.errors import InputError
from bipdeploy.model import checkpoint, hub, sources
from bipdeploy.model.checkpoint import INDEX, Checkpoint
from tests.hub import COMMIT, Answer, Hub, Request, contents, serving
from tests.running import SMOKE, bipdeploy, bipdeploy_here, python, refused
from tests.test_checkpoint import rewrite
from tests.tiny import PICO, tiny_model

READ = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"}
BESIDE = ("LICENSE", "Notice.txt", "USE_POLICY.md", "tekken.json", "tokenizer.model", "vocab.txt",
          "chat_template.jinja", "chat_template.json", "additional_chat_templates/tools.jinja")
UNREAD = ("consolidated.safetensors", "original/consolidated.00.pth", "original/params.json",
          "original/tokenizer.model", "model.gguf", "onnx/model.onnx", "onnx/config.json",
          "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "README.md", ".gitattributes",
          "training_args.json", "checkpoint-7/config.json", "checkpoint-7/model.safetensors",
          "modeling_own.py")
PAGE = b"<!DOCTYPE html><html><head><title>Sign in to the\n network</title></head></html>"


@pytest.fixture
def waited(tmp_path, monkeypatch) -> list[float]:
    """An empty cache, and the hub's client online; the pauses it makes, which take no time here."""
    pauses: list[float] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


@pytest.fixture
def pico(waited, monkeypatch):
    """The built-in model as org/name on a hub, beside what other repositories hold too."""
    files = contents(PICO) | {name: name.encode() for name in (*BESIDE, *UNREAD)}
    with serving(Hub(files)) as served:
        point_to(served.url, monkeypatch)
        yield served


def point_to(url: str, monkeypatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        url + "/{repo_id}/resolve/{revision}/{filename}")


def asked_for(served: Hub, part: str, name: str = "") -> list[Request]:
    return [r for r in served.asked if r.part == part and r.name == name]


# What is fetched

def test_what_is_read_is_fetched_once_and_nothing_else(pico):
    folder = sources.model_folder("org/name")
    assert pico.fetched() == READ | set(BESIDE)
    assert sum(pico.sent.values()) == sum(len(pico.files[name]) for name in pico.fetched())
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == pico.fetched()
    assert contents(folder)["model.safetensors"] == (PICO / "model.safetensors").read_bytes()
    Checkpoint(folder).verify()
    assert sources.model_folder("org/name") == folder
    assert sum(pico.sent.values()) == sum(len(pico.files[name]) for name in pico.fetched())


def test_the_shards_that_the_index_names_are_fetched(waited, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 200_000)
    sharded = rewrite(tiny_model(tmp_path / "tiny"), tmp_path / "sharded")
    shards = {path.name for path in sharded.glob("model-*.safetensors")}
    assert len(shards) > 2
    files = contents(sharded) | {name: b"no" for name in (
        "model.safetensors", "model-00001-of-00099.safetensors", "consolidated.safetensors")}
    with serving(Hub(files)) as served:
        point_to(served.url, monkeypatch)
        folder = sources.model_folder("org/name")
        assert {n for n in served.fetched() if n.endswith("safetensors")} == shards
        assert INDEX in served.fetched()
    Checkpoint(folder).verify()


def test_of_a_plan_only_the_config_is_fetched(pico):
    shown = bipdeploy_here("plan", SMOKE, "--set", "model.id=org/name")
    assert shown.returncode == 0, shown.stderr
    assert pico.fetched() == {"config.json"}


def test_code_is_fetched_only_where_it_may_run(pico):
    assert not (sources.model_folder("org/name") / "modeling_own.py").exists()
    assert (sources.model_folder("org/name", code=True) / "modeling_own.py").is_file()


def test_a_repository_without_safetensors(pico):
    del pico.files["model.safetensors"]
    with pytest.raises(InputError, match="org/name has no safetensors here: its repository has no"):
        sources.model_folder("org/name")


def test_a_damaged_index_is_named(pico):
    pico.files[INDEX] = b'{"weight_map": 3}'
    with pytest.raises(InputError, match=f"{INDEX} is damaged"):
        sources.model_folder("org/name")


# Without the hub

def test_what_the_cache_holds_needs_no_hub(pico, monkeypatch):
    folder = sources.model_folder("org/name")
    count = len(pico.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert sources.model_folder("org/name") == folder
    assert len(pico.asked) == count


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "unplugged"])
def test_a_cache_that_lacks_but_a_licence_is_taken(pico, monkeypatch, offline):
    folder = sources.model_folder("org/name")
    (folder / "LICENSE").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    point_to(f"http://127.0.0.1:{closed_port()}", monkeypatch)
    assert sources.model_folder("org/name") == folder
    (folder / "model.safetensors").unlink()
    refused_with("has no safetensors here" if offline else "the hub cannot be reached")


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_nothing_answers(waited, monkeypatch):
    point_to(f"http://127.0.0.1:{closed_port()}", monkeypatch)
    refused_with("org/name is neither a local folder nor in the hub cache, and the hub cannot be "
                 "reached (", "refused", "; use a local folder or builtin:pico")
    assert waited == []  # a machine without a network does not wait for one


# What passes by itself

def once(part: str, answer: Answer, name: str = "", method: str = "GET", times: int = 1):
    """A fault that comes `times` times, and then no more."""
    left = [times]

    def fault(request: Request) -> Answer | None:
        if (request.part, request.name, request.method) == (part, name, method) and left[0]:
            left[0] -= 1
            return answer
        return None

    return fault


@pytest.mark.parametrize(("fault", "pause"), [
    (once("api", Answer(429, b"{}", headers={"Retry-After": "7"})), 7),
    (once("file", Answer(429, b"", headers={"Retry-After": "7"}), "config.json", "HEAD"), 0),
    (once("file", Answer(429, b"", headers={"Retry-After": "7"}), "model.safetensors"), 7),
    (once("api", Answer(503, b"{}"), times=3), 4),
    (once("file", Answer(502, b""), "tokenizer.json", times=2), 2),
    (once("api", Answer(200, b"{}", cut=0)), 1)],
    ids=["429", "429 of a head", "429 of a file", "503", "502 of a file", "cut off"])
def test_what_passes_is_tried_again(pico, waited, fault, pause):
    pico.fault = fault
    Checkpoint(sources.model_folder("org/name")).verify()
    assert pause <= max([0, *waited]) <= pause + 1


def test_a_file_that_is_cut_off_goes_on_where_it_stopped(pico, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what is kept at a time
    whole = pico.files["model.safetensors"]
    true = pico.true_answer(Request("GET", "file", "model.safetensors", 0))
    pico.fault = once("file", Answer(200, whole, true.kind, true.headers, cut=len(whole) // 2),
                      "model.safetensors")
    Checkpoint(sources.model_folder("org/name")).verify()
    starts = [r.start for r in asked_for(pico, "file", "model.safetensors") if r.method == "GET"]
    assert len(starts) == 2
    assert 0 == starts[0] < starts[1] <= len(whole) // 2
    assert pico.sent["model.safetensors"] == len(whole) // 2 + len(whole) - starts[1]


# What does not

def refused_with(*words: str) -> None:
    with pytest.raises(InputError) as caught:
        sources.model_folder("org/name")
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, (word, line)


HOSTS_WORDS = b'{"error": "down for\\n maintenance"}'
UNTIL_TOMORROW = Answer(429, b"slow down", "text/plain", {"Retry-After": "86400"})


@pytest.mark.parametrize(("answer", "requests", "words"), [
    (Answer(503, HOSTS_WORDS), 4, ["answers (4 times) 503 Service Unavailable (down for "
                                   "maintenance)", "run again later"]),
    (Answer(429, b"{}"), 4, ["(4 times) 429 Too Many Requests", "hf auth login"]),
    (UNTIL_TOMORROW, 1, ["429 Too Many Requests (slow down) and asks to wait 86400 s"]),
    (Answer(403, PAGE, "text/html"), 1, ["403 Forbidden (Sign in to the network)", "HF_ENDPOINT"]),
    (Answer(407, PAGE, "text/html"), 1, ["407 Proxy Authentication Required", "HTTPS_PROXY"]),
    (Answer(401, b"{}", headers={"X-Error-Message": "Invalid credentials in Authorization header"}),
     1, ["401 Unauthorized (Invalid credentials", "hf auth login"]),
    (Answer(404, PAGE, "text/html"), 1, ["404 Not Found", "check the id"]),
    (Answer(200, PAGE, "text/html"), 1, ["does not answer as a hub does", "sign in"]),
    (Answer(200, b"[]"), 1, ["does not answer as a hub does"]),
    (Answer(200, b"{}", cut=0), 4, ["the connection to 127.0.0.1", "broke off (4 times)"]),
    (Answer(403, b"{}", headers={"X-Error-Code": "GatedRepo"}), 1, ["licence to be accepted"]),
    (Answer(404, b"{}", headers={"X-Error-Code": "RepoNotFound"}), 1, ["hub has no model org/na"]),
    (Answer(404, b"{}", headers={"X-Error-Code": "RevisionNotFound"}), 1, ["has no revision"]),
], ids=lambda value: value.status if isinstance(value, Answer) else "")
def test_what_the_hub_answers_is_said_in_one_line(pico, answer, requests, words):
    pico.fault = lambda request: answer if request.part == "api" else None
    refused_with(*words)
    assert len(asked_for(pico, "api")) == requests


@pytest.mark.parametrize(("answer", "words"), [
    (Answer(503, HOSTS_WORDS), ["(4 times) 503 Service Unavailable (down for maintenance)"]),
    (Answer(403, PAGE, "text/html"), ["403 Forbidden"]),
    (Answer(200, b"x" * 900, cut=0), ["broke off (4 times)", "files that are whole are kept"]),
    (Answer(200, b"x" * 9), ["another size than it said", "Consistency check failed"])],
    ids=lambda value: value.status if isinstance(value, Answer) else "")
def test_weights_that_never_come_are_said_in_one_line(pico, answer, words):
    def fault(request: Request) -> Answer | None:
        return answer if request[:3] == ("GET", "file", "model.safetensors") else None

    pico.fault = fault
    refused_with("model.id: org/name could not be had", *words)
    assert "tokenizer.json" in pico.fetched()
    pico.fault = lambda _: None
    sent = dict(pico.sent)
    Checkpoint(sources.model_folder("org/name")).verify()  # what came is kept
    assert {name for name in sent if pico.sent[name] != sent[name]} <= {"model.safetensors"}


def test_a_login_page_in_the_place_of_a_file_does_not_stay_in_the_cache(pico):
    page = pico.files | {"config.json": PAGE}
    whole, pico.files = pico.files, page
    refused_with("127.0.0.1", "gave a web page for org/name's config.json", "sign in")
    pico.files = whole
    Checkpoint(sources.model_folder("org/name")).verify()


def test_a_login_page_without_the_hub_s_headers(pico):
    pico.fault = lambda request: (Answer(200, PAGE, "text/html") if request.part == "file"
                                  else None)
    refused_with("does not answer as a hub does", "sign in")


def test_what_is_no_hub_id(waited):
    with pytest.raises(InputError, match="'org/na me' is neither a folder nor a hub id: "):
        sources.model_folder("org/na me")


@pytest.mark.slow
def test_a_proxy_that_wants_a_login():
    with serving(Hub({})) as served:
        code = ("from bipdeploy.model import sources\n"
                "try:\n    sources.model_folder('org/name')\n"
                "except Exception as error:\n    print(type(error).__name__, error)")
        done = python(code, env={"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "https://hub.invalid",
                                 "HTTPS_PROXY": served.url, "https_proxy": served.url,
                                 "NO_PROXY": "", "no_proxy": ""})
    assert done.stdout.startswith("InputError model.id: org/name could not be had: the proxy "
                                  "answers 407 Proxy Authentication Required")
    assert done.stderr == ""


# The cache

def test_a_cache_that_is_a_file_is_named(pico, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    refused_with("HF_HUB_CACHE", str(tmp_path / "file" / "hub"), "Not a directory", "HF_HOME")


@pytest.fixture
def small(tmp_path, request):
    """A file system in memory, with the options of the parameter, where this user may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", place],
                          capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


FULL = ["No space left on device", "free some space"]


@pytest.mark.parametrize(("small", "words"), [
    ("size=1m", FULL), ("size=8m,ro", ["Read-only file system", "make it writable"])],
    ids=["full", "read-only"], indirect=["small"])
def test_a_cache_that_cannot_be_written_is_named(pico, monkeypatch, small, words):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(small / "hub"))
    refused_with("HF_HUB_CACHE: the cache", str(small / "hub"), *words, "HF_HOME")


@pytest.mark.parametrize("small", ["size=64k"], indirect=True)
def test_the_cache_of_the_library_of_texts_is_told_by_the_same_words(small, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n' * 20_000)
    with pytest.raises(Exception) as caught:
        load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(small))
    line = hub.cache_fault(caught.value, str(small), "HF_DATASETS_CACHE")
    assert line is not None
    assert line.startswith(f"HF_DATASETS_CACHE: the cache {small} cannot be written")
    assert all(word in line for word in FULL)


def test_the_fault_of_a_cache_is_told_from_that_of_a_host():
    full = hub.cache_fault(OSError(errno.ENOSPC, "No space left on device"), "/c", "HF_HOME")
    assert full is not None and full.startswith("HF_HOME: the cache /c cannot be written")
    assert hub.cache_fault(OSError("Bad gateway"), "/c") is None
    assert hub.cache_fault(ValueError("no such split"), "/c") is None


# The whole way

@pytest.mark.slow
def test_a_model_of_the_hub_is_checked_planned_and_scored(tmp_path):
    files = contents(PICO) | {name: name.encode() for name in UNREAD}
    model = ["--set", "model.id=org/name", "--set", "calibration.samples=8"]
    with serving(Hub(files)) as served:
        env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / "hf"),
               "NO_PROXY": "127.0.0.1"}
        assert bipdeploy("check", SMOKE, *model, env=env).returncode == 0
        assert served.asked == []
        planned = bipdeploy("plan", SMOKE, *model, env=env)
        assert planned.returncode == 0, planned.stderr
        assert served.fetched() == {"config.json"}
        done = bipdeploy("run", SMOKE, "--runs", tmp_path / "runs", "--until", "score", *model,
                         env=env)
        assert done.returncode == 0, done.stderr
        assert served.fetched() == READ
        assert sum(served.sent.values()) == sum(len(files[name]) for name in READ)
    assert (tmp_path / "runs" / "smoke" / "score" / "manifest.json").is_file()
    assert (tmp_path / "hf" / "hub" / "models--org--name" / "snapshots" / COMMIT).is_dir()


@pytest.mark.slow
def test_a_hub_that_is_down_is_one_line_of_the_command(tmp_path):
    with serving(Hub({}, lambda _: Answer(403, PAGE, "text/html"))) as served:
        done = bipdeploy("plan", SMOKE, "--set", "model.id=org/name",
                         env={"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": served.url,
                              "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"})
    refused(done, 2, "org/name could not be had", "403 Forbidden (Sign in to the network)")
