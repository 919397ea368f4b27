"""The pages without a browser: what they answer, refuse, write and start."""

from __future__ import annotations

import asyncio
import html
import io
import json
import re

import datasets
import pytest
import yaml
from studio_helpers import an_adapter, client, parses, studio, until

from graftlm.studio import records, running
from graftlm.studio.errors import PageError
from graftlm.studio.index import recipe_in

PLACES = ("/", "/data", "/data/tweets", "/train", "/runs", "/compare", "/chat", "/adapters")


@pytest.mark.parametrize("place", PLACES)
def test_every_page_answers_in_both_languages(browser, place):
    english = browser.get(place, headers={"Accept-Language": "en"}).text
    chinese = browser.get(place, headers={"Accept-Language": "zh-CN,zh;q=0.9"}).text
    assert '<html lang="en"' in english and '<html lang="zh"' in chinese
    assert not re.search("[\u4e00-\u9fff]", english.replace("中文", ""))
    assert len(re.findall("[\u4e00-\u9fff]", chinese)) > 20


def test_preferences_are_kept(browser):
    answer = browser.post("/preferences", data={"language": "zh", "theme": "dark"})
    assert answer.headers["hx-refresh"] == "true"
    assert 'lang="zh" data-theme="dark"' in browser.get("/").text
    browser.post("/preferences", data={"language": '"><script>', "theme": "x"})
    assert 'lang="zh" data-theme="dark"' in browser.get("/").text


def test_a_page_that_is_not_there(browser):
    answer = browser.get("/nothing")
    assert answer.status_code == 404 and "There is no such page." in answer.text
    part = browser.get("/runs/nothing", headers={"HX-Request": "true"})
    assert part.status_code == 404 and "<html" not in part.text and "nothing" in part.text


# -- training --------------------------------------------------------------------------------------------------------------
def checked(browser, text: str, **form: str):
    found = browser.post("/train/check", data={"text": text, "by": "form" if form else "yaml"} | form)
    assert found.status_code == 200
    return found.text


def test_form_and_yaml_go_both_ways(browser):
    shown = checked(browser, "method: lora\ntraining: {epochs: 3, learning_rate: 1e-3}\nmethod_options: {r: 4}\n")
    for key, value in {"training.epochs": "3", "method_options.r": "4", "training.learning_rate": "0.001"}.items():
        assert re.search(rf'name="{key}" value="{value}"', shown), key
    assert 'class="problems"' not in shown
    back = checked(browser, "method: lora\n", **{"training.epochs": "5", "data.source": "quotes", "training.seed": ""})
    text = re.search(r'data-sets="yaml" hidden>(.*?)</div>', back, re.S)[1]
    assert yaml.safe_load(text) == {"method": "lora", "training": {"epochs": 5}, "data": {"source": "quotes"}}


def test_mistakes_are_told_as_the_recipe_tells_them(browser):
    text = checked(browser, "trainin: {epochs: 3}\nmethod: loraa\ntraining: {epochs: -1, epoch: 2}\n")
    for hint in (
        "did you mean &#39;training&#39;",
        "did you mean &#39;lora&#39;",
        "training.epochs",
        "training.epoch: unknown",
    ):
        assert hint in text, hint
    assert 'data-key="training.epochs"' in text and "/train/plan" not in text.replace('hx-post="/train/check"', "")
    assert "not valid YAML" in checked(browser, "a: [1")
    assert "expected keys and values" in checked(browser, "- 1\n")
    broken = checked(browser, "method: [lora\n", **{"training.epochs": "2"})
    assert "not valid YAML" in broken and 'data-sets="yaml" hidden>method: [lora\n<' in broken  # nor of a broken one
    kept = checked(browser, "typo: 1\n", **{"training.epochs": "2"})
    assert "typo: 1" in kept and "unknown key" in kept  # a form's edit loses nothing of the text


def test_options_follow_the_method(browser):
    text = checked(browser, "method: lora\nmethod_options: {r: 4}\n", method="prompt-tuning", options_of="lora")
    assert 'name="method_options.num_virtual_tokens"' in text and 'name="method_options.r"' not in text
    assert "method_options" not in re.search(r'data-sets="yaml" hidden>(.*?)</div>', text, re.S)[1]
    same = checked(browser, "method: lora\n", **{"training.epochs": "2", "options_of": "lora"})
    assert 'id="options"' not in same  # a field that is typed into stays


def test_paths_outside_are_refused_in_recipes(browser, made, tmp_path):
    secret = tmp_path / "other" / "rows.jsonl"
    (made.workspace.data / "link.jsonl").symlink_to(secret)
    for text in (
        f"data: {{source: {secret}}}", "data: {source: ../other/rows.jsonl}", "data: {source: data/link.jsonl}",
        f"base: {secret.parent}", "init_from: /etc", "base: '~/'", "data: {source: .studio/key}",
        f"method_options: {{tokenizer_name_or_path: {secret.parent}}}",
    ):  # fmt: skip
        assert "outside" in checked(browser, text), text
        assert browser.post("/train/start", data={"text": text}).status_code == 200 and not made.jobs.going()
    assert "outside" not in checked(browser, "base: owner/name\ndata: {source: other/name}")


def test_a_run_is_started_and_repeated(browser, made):
    answer = browser.post("/train/start", data={"text": "training: {epochs: 2}\n", "title": "My first/run"})
    name = answer.headers["hx-redirect"].removeprefix("/runs/")
    folder = made.workspace.run(name)
    assert name == "My-first-run" and recipe_in(folder) == {"training": {"epochs": 2}, "output_dir": f"runs/{name}"}
    args = records.read(folder / "job.json")["args"]
    assert args == ["train", f"runs/{name}/settings.yaml", "--progress"] and parses([*args, "--resume"])
    until(lambda: made.look() or made.index.run(name).state == "done")
    page = browser.get(f"/runs/{name}")
    assert page.status_code == 200 and "graftlm train runs/My-first-run/settings.yaml" in page.text
    again = browser.get(f"/train?from={name}").text
    assert "epochs: 2" in again and "output_dir" not in again
    assert "event: end" in browser.get(f"/runs/{name}/events").text


def test_lists_show_what_is_now(browser, made):
    """A run that ended since is shown so at once; a list that is open is told when it changed, and only then."""
    folder = made.workspace.new_run("one")
    made.jobs.add(folder, "train", ["sleep", "600"])
    for place, part in (("/runs", "runs"), ("/", "now")):
        page = browser.get(place).text
        assert 'class="badge running"' in page
        again = html.unescape(re.search(rf'hx-get="([^"]+)" hx-trigger="every 3s" hx-target="#{part}"', page)[1])
        headers = {"HX-Request": "true", "HX-Target": part}
        assert browser.get(again, headers=headers).status_code == 204
        records.write(folder / "state.json", records.read(folder / "state.json") | {"state": "stopping"})  # by another hand
        news = browser.get(again, headers=headers).text
        assert (
            'class="badge stopping"' in news and "<html" not in news and 'class="badge stopping"' in browser.get(place).text
        )
        records.write(folder / "state.json", records.read(folder / "state.json") | {"state": "running"})
    made.jobs.stop(folder, at_once=True)
    until(lambda: made.look() or not made.jobs.going())
    other = made.workspace.new_run("by-hand")  # as the command line makes it
    assert 'class="badge unknown"' in browser.get("/runs").text
    (other / "metrics.json").write_text('{"metrics": {"loss": 1.5, "loss_before": 2.5}}')
    assert 'class="badge unknown"' not in (text := browser.get("/runs").text) and "2.5 → <b>1.5</b>" in text


PLAN = {
    "fits": False, "needs": 9 * 2**30, "free": 2**30, "time": [1.0, 2.0], "updates": 5, "trained": 10, "of": 100, "rows": 3,
    "longest": 4, "together": 1,
    "changes": [{"values": {"training.batch_size": "1"}, "needs": 2**29, "time": None, "fits": True}],
}  # fmt: skip


def test_a_plan_says_what_would_fit_and_changes_it_so(browser, made, monkeypatch):
    asked = []

    async def ask(name, /, **values):
        asked.append((name, values))
        return PLAN

    with monkeypatch.context() as patched:
        patched.setattr(made.worker, "ask", ask)
        text = browser.post("/train/plan", data={"text": "method: lora\n"}).text
    assert "Does not fit" in text and "9.00 GiB at most" in text and asked == [("plan", {"texts": ["method: lora\n"]})]
    values = json.loads(html.unescape(re.search(r'hx-vals="([^"]+)"', text)[1]))
    values["text"] = "method: lora\ntraining: {epochs: 2, batch_size: 8}\n"
    changed = browser.post("/train/check", data=values).text
    written = yaml.safe_load(re.search(r'data-sets="yaml" hidden>(.*?)</div>', changed, re.S)[1])
    assert written == {"method": "lora", "training": {"epochs": 2, "batch_size": 1}}
    assert 'name="training.batch_size" value="1"' in changed  # the form follows

    async def refuse(name, /, **values):
        raise PageError(422, "no such base <b>")

    monkeypatch.setattr(made.worker, "ask", refuse)
    assert "no such base &lt;b&gt;" in browser.post("/train/plan", data={"text": ""}).text


def test_runs_that_train_together(browser, made, tmp_path):
    first, second = "method: lora\n", "method: ia3\ntraining: {seed: 3}\n"
    put = browser.post("/train/beside", data={"text": first}).text
    assert f'<textarea name="other" hidden aria-hidden="true">{first}' in put and "/train/plan" in put
    for bad, said in (
        (first, "change it first"), ("base: smollm2\n", "share one base in one form"), ("method: loraa\n", "did you mean"),
    ):  # fmt: skip
        for place in ("/train/beside", "/train/check", "/train/start"):
            text = browser.post(place, data={"text": bad, "other": [first], "by": "yaml"}).text
            assert said in text and "<li class" not in text, (place, bad)
    secret = f"data: {{source: {tmp_path / 'other' / 'rows.jsonl'}}}\n"
    assert "outside" in browser.post("/train/start", data={"text": second, "other": [secret]}).text and not made.jobs.going()
    answer = browser.post("/train/start", data={"text": second, "other": [first], "title": "both"})
    assert answer.headers["hx-redirect"] == "/runs/both"
    folders = [made.workspace.run(name) for name in ("both", "both-2")]
    assert [recipe_in(f)["output_dir"] for f in folders] == ["runs/both", "runs/both-2"]
    args = ["train", "runs/both/settings.yaml", "runs/both-2/settings.yaml", "--progress"]
    assert all(records.read(f / "job.json")["args"] == args for f in folders)
    until(lambda: made.look() or {r.state for r in made.index.runs()} == {"done"})
    page = browser.get("/runs/both-2").text
    assert 'href="/runs/both"' in page and "args train" in page  # the log is the first one's


def test_a_run_that_waits_says_whether_it_fits_beside_what_goes_on(browser, made):
    folders = [made.workspace.new_run(name) for name in "ab"]
    for folder in folders:
        (folder / "settings.yaml").write_text(f"output_dir: runs/{folder.name}\n")
        made.jobs.add(folder, "train", ["sleep", "600"])
    assert "fit beside" not in browser.get("/runs/b").text
    asked = []

    async def ask(name, /, texts):
        asked.append((name, texts))
        return PLAN | {"needs": 1}

    made.worker.ask = ask
    asyncio.run(made.plan_queue())
    asyncio.run(made.plan_queue())
    assert asked == [("plan", ["output_dir: runs/a\n"]), ("plan", ["output_dir: runs/b\n"])]  # each once
    page = browser.get("/runs/b").text
    assert "it fits beside what goes on" in page and 'id="beside"' in page
    assert browser.post("/runs/b/beside").headers["hx-redirect"] == "/runs/b" and made.jobs.going() == ["a", "b"]
    for folder in folders:
        browser.post(f"/runs/{folder.name}/stop", data={"now": "1"})
    until(lambda: made.look() or {r.state for r in made.index.runs()} == {"stopped"})


# -- data ------------------------------------------------------------------------------------------------------------------
ROWS = "".join(
    json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in [("a", "b"), ("c", ""), ("a", "b"), ("d", "e " * 900)]
)


def upload(browser, name: str, content: bytes | str):
    return browser.post("/data/upload", files={"file": (name, content)})


def test_an_upload_is_read_and_shown(browser, made):
    answer = upload(browser, "../../My rows.jsonl", ROWS)
    assert answer.headers["hx-redirect"] == "/data/My-rows.jsonl" and (made.workspace.data / "My-rows.jsonl").exists()
    text = browser.post("/data/My-rows.jsonl/look", data={}).text
    assert "Format: completion" in text and 'class="labelled"' in text and "<svg" in text
    assert re.search(r"<b>1</b> rows have no answer.*: 1<", text) and re.search(
        r"<b>1</b> rows stand there more.*: 2<", text
    )
    assert re.search(r"<b>1</b> rows are longer.*: 3<", text)
    swapped = {"format_shown": "completion", "role.prompt": "completion", "role.completion": "prompt"}
    text = browser.post("/data/My-rows.jsonl/look", data=swapped).text
    assert re.search(r'name="role.prompt">.*?value="completion" selected', text, re.S)
    link = re.search(r'id="to-train" href="([^"]+)"', text)[1].replace("&amp;", "&")
    assert "completion: prompt" in browser.get(link).text
    assert upload(browser, "My rows.jsonl", ROWS).headers["hx-redirect"] == "/data/My-rows-2.jsonl"
    browser.post("/data/My-rows.jsonl/delete")
    assert browser.get("/data/My-rows.jsonl").status_code == 404


@pytest.mark.parametrize(
    ("format", "chosen"),
    [("completion", {"prompt": "ask", "completion": "reply"}), ("label", {"text": "ask", "label": "reply"})],
)
def test_columns_that_no_format_knows_are_chosen_one_by_one(browser, made, format, chosen):
    upload(browser, "rows.csv", "ask,reply\n" + "".join(f"question {i},answer {i % 2}\n" for i in range(4)))
    text = browser.post("/data/rows.csv/look", data={}).text
    assert "no format fits the columns" in text and 'name="role.' not in text
    form = {"format": format}
    for role, column in chosen.items():
        text = browser.post("/data/rows.csv/look", data=form).text
        assert "needs columns" in text and re.findall(r'name="role.(\w+)"', text) == [*chosen] and "to-train" not in text
        form |= {"format_shown": re.search(r'name="format_shown" value="(\w*)"', text)[1], f"role.{role}": column}
    text = browser.post("/data/rows.csv/look", data=form).text
    assert 'role="alert"' not in text and 'class="labelled"' in text
    link = html.unescape(re.search(r'id="to-train" href="([^"]+)"', text)[1])
    assert all(f"{role}: {column}" in browser.get(link).text for role, column in chosen.items())


def test_tokens_are_shown_as_whole_characters(browser):
    """Also of a text whose characters are several tokens each; put together they are the prepared text."""
    from graftlm.studio.looking import pieces, tokenizer_of

    tokenizer = tokenizer_of("graftlm-base")
    ids = tokenizer("图书馆 has a \ufffd and 15 ÷ 9, 愉快</s>")["input_ids"]
    labels = [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]
    found = pieces({"input_ids": ids, "labels": labels}, tokenizer)
    assert "".join(p["text"] for p in found) == tokenizer.decode(ids) and {"馆", "愉"} <= {p["text"].strip() for p in found}
    assert len(found) < len(ids) and [p["labelled"] for p in found] == sorted(p["labelled"] for p in found)
    assert "\ufffd" not in browser.post("/data/alpaca-zh/look", data={}).text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("rows.exe", b"MZ", "expected a file of"), ("rows.py", b"print()", "expected a file of"), ("", b"x", "Choose a file"),
     ("rows.jsonl", b"{cut", "JSON"), ("rows.json", b"", "empty"), ("rows.parquet", b"PAR1 no", "cannot read"),
     ("rows.csv", b"\xff\xfe\x00\xd8", "rows.csv")],
)  # fmt: skip
def test_bad_uploads_say_why_and_leave_nothing(browser, made, name, content, said):
    answer = upload(browser, name, content)
    assert 400 <= answer.status_code < 500 and said in answer.text.replace("&#39;", "'"), answer.text[-500:]
    assert list(made.workspace.data.iterdir()) == []


def test_large_uploads_are_refused(tmp_path):
    made = studio(tmp_path, max_upload=1000)
    answer = upload(client(made), "rows.csv", "a\n" + "1\n" * 2000)
    assert answer.status_code == 413 and list(made.workspace.data.iterdir()) == []


def test_pointing(browser, made, tmp_path):
    there = tmp_path / "given" / "rows.jsonl"
    there.write_text(ROWS)
    assert browser.post("/data/point", data={"path": str(there)}).headers["hx-redirect"] == "/data/rows.jsonl"
    assert str(there) in browser.get("/data").text
    assert browser.post("/data/point", data={"path": str(there)}).status_code == 409
    for path, status in {"../other/rows.jsonl": 403, "/etc/passwd": 403, str(there) + "x": 404, "": 404}.items():
        assert browser.post("/data/point", data={"path": path}).status_code == status
    browser.post("/data/rows.jsonl/delete")
    assert there.exists() and browser.get("/data/rows.jsonl").status_code == 404
    assert browser.post("/data/tweets/delete").status_code == 409


def test_parquet_and_a_folder_are_looked_at(browser, made, tmp_path):
    rows = datasets.Dataset.from_list([json.loads(line) for line in ROWS.splitlines()])
    buffer = io.BytesIO()
    rows.to_parquet(buffer)
    assert upload(browser, "rows.parquet", buffer.getvalue()).headers["hx-redirect"] == "/data/rows.parquet"
    folder = tmp_path / "given" / "folder"
    folder.mkdir()
    (folder / "part-1.jsonl").write_text(ROWS)
    place = browser.post("/data/point", data={"path": str(folder)}).headers["hx-redirect"]
    for data in ("/data/rows.parquet", place):
        found = browser.post(f"{data}/look", data={"base": "graftlm-base"}).text
        assert all(str(value) in html.unescape(found) for value in rows[0].values()), found


def test_the_address_is_said_and_opened(tmp_path, monkeypatch):
    said, opened = [], []
    monkeypatch.setattr(running.webbrowser, "open", opened.append)
    monkeypatch.setattr(running.Server, "run", lambda self, sockets: (self.ready(), [door.close() for door in sockets]))
    for browser in (True, False):
        running.run(tmp_path / "here", [], port=0, browser=browser, at_once=1, max_upload=1000, say=said.append)
    assert opened == [said[0].removeprefix("GraftLM Studio: ")] and "/?token=" in opened[0] and len(said) == 2


def test_a_link_that_was_changed_is_not_followed(browser, made, tmp_path):
    records.write(made.workspace.data / "rows.jsonl.link.json", {"path": str(tmp_path / "other" / "rows.jsonl")})
    made.index.sync()
    for answer in (browser.get("/data/rows.jsonl"), browser.post("/data/rows.jsonl/look")):
        assert answer.status_code == 403 and "secret" not in answer.text


# -- chat ------------------------------------------------------------------------------------------------------------------
class Echo:
    """A server whose models say what they were asked."""

    def __init__(self) -> None:
        self.asked: list = []

    async def use(self, base: str) -> None:
        if base == "broken":
            raise PageError(422, "broken cannot be served: <b>")

    async def write(self, adapter, messages, **params):
        self.asked.append((adapter, messages, params))
        if adapter == "bad":
            raise PageError(404, "no such model")
        for word in (adapter or "base", " said: ", messages[-1]["content"]):
            yield word

    async def end(self) -> None:
        self.asked.clear()


def test_a_chat_of_three_with_votes(browser, made):
    made.server = Echo()
    for name in ("one", "bad"):
        an_adapter(made, name)
    form = {"base": "graftlm-base", "adapter": ["", "one", "bad"], "message": "<b>hi</b>", "system": "Be kind.", "seed": "3"}
    form |= {"top_k": "5", "repetition_penalty": "1.2", "frequency_penalty": "-1"}
    text = browser.post("/chat/send", data=form).text
    name = re.search(r'name="name" id="chat-name" value="([^"]+)"', text)[1]
    assert "<b>hi" not in text and "&lt;b&gt;hi" in text
    assert text.count("sse-swap=") == text.count('hx-target="this" hx-swap="innerHTML"') == 4  # not the form's own
    events = browser.get(f"/chat/{name}/0/events").text
    assert "one said: &lt;b&gt;hi&lt;/b&gt;" in events and "<b>hi" not in events and "no such model" in events
    assert events.rstrip().endswith("data:") and "event: end" in events
    assert made.server.asked[0][1][0] == {"role": "system", "content": "Be kind."} and made.server.asked[0][2] == {
        "max_tokens": 128, "temperature": 0.0, "seed": 3, "top_k": 5, "repetition_penalty": 1.2, "frequency_penalty": -1.0,
    }  # fmt: skip
    assert browser.post(f"/chat/{name}/rows").status_code == 422
    assert 'aria-pressed="true"' in browser.post(f"/chat/{name}/0/vote", data={"answer": "one"}).text
    assert browser.post(f"/chat/{name}/0/vote", data={"answer": "bad"}).status_code == 422
    browser.post("/chat/send", data=form | {"name": name, "message": "again"})
    made.server.asked.clear()
    browser.get(f"/chat/{name}/1/events")
    (own,) = [m for a, m, _ in made.server.asked if a == "one"]
    assert [m["content"] for m in own] == ["Be kind.", "<b>hi</b>", "one said: <b>hi</b>", "again"]
    page = browser.get(f"/chat?name={name}").text
    assert re.search(r'name="top_k"[^>]*value="5"', page) and re.search(r'name="seed"[^>]*value="3"', page)
    assert "one said: again" in page and made.index.chats()[0].votes == 1
    place = browser.post(f"/chat/{name}/rows").headers["hx-redirect"]
    (row,) = [json.loads(line) for line in (made.workspace.data / place.rpartition("/")[2]).read_text().splitlines()]
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
    assert browser.get(f"/chat/{name}/9/events").status_code == 404


def test_what_a_chat_refuses(browser, made):
    made.server = Echo()
    good = {"base": "graftlm-base", "adapter": "", "message": "hi"}
    for bad, status in (
        ({"message": " "}, 422), ({"adapter": "nothing"}, 404), ({"temperature": "hot"}, 422), ({"max_tokens": "0"}, 422),
        ({"top_k": "0"}, 422), ({"presence_penalty": "9"}, 422),
        ({"base": "/etc"}, 403), ({"name": "../x"}, 404), ({"name": "nothing"}, 404),
    ):  # fmt: skip
        assert browser.post("/chat/send", data=good | bad).status_code == status, bad
    text = browser.post("/chat/send", data=good | {"base": "broken"}).text
    name = re.search(r'id="chat-name" value="([^"]+)"', text)[1]
    assert "cannot be served: &lt;b&gt;" in browser.get(f"/chat/{name}/0/events").text
