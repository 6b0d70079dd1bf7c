"""`gigacam view` as a command: what it prints, what it refuses, how it ends."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import main
from tests.test_workers.viewer_runs import made_run


def test_it_serves_until_interrupted(tmp_path: Path) -> None:
    made_run(tmp_path)
    command = [sys.executable, "-m", "flows.cli", "view", str(tmp_path), "--port", "0", "--token", "t0ken"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as viewer:
        assert viewer.stdout is not None
        said = viewer.stdout.readline()
        found = re.fullmatch(r"viewer: http://127\.0\.0\.1:(\d+)/\?token=t0ken\n", said)
        assert found, said
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=30)
        connection.request("GET", "/api/images?token=t0ken")
        assert connection.getresponse().status == 200
        connection.close()
        viewer.send_signal(signal.SIGINT)
        _, errors = viewer.communicate(timeout=30)
    assert viewer.returncode == 0
    assert errors == "viewer ended\n"


@pytest.mark.parametrize(
    ("make", "words", "said"),
    [
        ("", ("empty",), "holds no run of gigacam"),
        ("run", (".",), "did you mean"),
        ("run", ("absent",), "no such folder"),
        ("run", ("run", "--source", "absent"), "--source absent: no such folder"),
        ("run", ("run", "--host", "no.such.host.invalid"), "cannot listen there"),
        ("run", ("run", "--port", "{taken}"), "choose another port"),
        ("run", ("run", "--cors", "https://a.example/page"), "expected the origin of a page"),
        (
            "run",
            ("run", "--port", "{taken}", "--token", "a+b&c"),
            "--token: has '+&'; expected letters, digits",
        ),
        ("run", ("run", "--port", "{taken}", "--token", "clé"), "expected letters, digits"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    make: str, words: tuple[str, ...], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    if make:
        (tmp_path / "run" / "a-12345678" / "heatmap.ome.zarr").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit) as ended:
            main(("view", *(port if word == "{taken}" else word for word in words)))
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
