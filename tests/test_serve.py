"""segnet serve: the answers over Flask's test client, the page in a headless browser."""

import io
import json
import re
import shutil
import threading
import zlib
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from support.commands import assert_error

from segnet_scratch import SegNetBasic, weights
from segnet_scratch.data import read_image, resize_mask
from segnet_scratch.data.drawing import Style
from segnet_scratch.inference import Inference, Segmenter
from segnet_scratch.serve import MAX_BYTES, application, serve

pytest.importorskip("flask", reason="Flask is not installed: pip install 'segnet_scratch[serve]'")
waitress = pytest.importorskip("waitress", reason="waitress is not installed: pip install 'segnet_scratch[serve]'")

NAMES = ["background", "road", "<b>sky</b>", "tree"]
STYLE = Style(NAMES, [[0, 0, 0], [200, 40, 40], [40, 90, 220], [30, 160, 60]], 0.5)


def segmenter(samples=0, size=(32, 40)):
    model = SegNetBasic(len(NAMES), 1 / 16, "numpy", seed=3, dropout=True).eval()
    model.classifier.weight.data[...] *= 20
    return Segmenter(model, size, Inference(samples=samples))


@pytest.fixture(scope="module")
def app():
    return application(segmenter(samples=2), STYLE, "model.safetensors")


def photo(height=48, width=64, kind="PNG", **options):
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, 255 - rows], axis=2).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


def post(app, content, **options):
    return app.test_client().post("/segment", data=content, **options)


def picture(uri):
    return Image.open(io.BytesIO(b64decode(uri.partition("base64,")[2])))


def test_the_answer_is_what_the_segmenter_finds(app):
    content = photo()
    answer = post(app, content)
    assert answer.status_code == 200
    found = answer.get_json()
    expected = segmenter(samples=2)(read_image("x", stream=io.BytesIO(content)))
    np.testing.assert_array_equal(np.array(picture(found["labels"])), expected.labels)
    assert found["shares"] == [float((expected.labels == k).mean()) for k in range(len(NAMES))]
    assert len({share > 0 for share in found["shares"]}) == 2 or min(found["shares"]) > 0
    assert found["largest"] == expected.uncertainty.max() > 0
    assert picture(found["uncertainty"]).size == picture(found["photo"]).size == (64, 48)
    assert 0 < found["network"] <= found["seconds"]
    assert "uncertainty" not in post(application(segmenter(), STYLE, "m"), content).get_json()


def test_a_large_picture_is_shown_smaller_and_one_on_its_side_upright(app):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = photo(40, 2000, "JPEG", exif=exif)
    found = post(app, content).get_json()
    assert (found["height"], found["width"]) == (2000, 40)
    assert picture(found["labels"]).size == picture(found["photo"]).size == (32, 1600)
    labels = segmenter(samples=2)(read_image("x", for_prediction=True, stream=io.BytesIO(content))).labels
    np.testing.assert_array_equal(np.array(picture(found["labels"])), resize_mask(labels, (1600, 32)))


def gigapixels(side=20_000):
    content = bytearray(photo())
    content[16:24] = side.to_bytes(4, "big") * 2  # width and height in the header of a PNG, and its checksum
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "status", "part"),
    [
        (gigapixels(), 422, "at most 64,000,000 pixels, got more; scale the picture down"),
        (b"", 422, "empty"),
        (b"<html>no picture</html>", 422, "not readable as JPEG or PNG or BMP or WEBP or TIFF"),
        (photo()[:100], 422, "damaged"),
        (b"\0" * (MAX_BYTES + 1), 413, "more than 32 MiB"),
    ],
    ids=["20,000 pixels a side", "empty", "no picture", "cut off", "too many bytes"],
)
def test_what_is_no_picture_is_refused_and_nothing_is_left(app, tmp_path, monkeypatch, content, status, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    answer = post(app, content)
    assert answer.status_code == status
    assert part in answer.get_json()["error"]
    assert list(tmp_path.iterdir()) == []
    assert post(app, photo()).status_code == 200  # it goes on


def test_only_its_own_page_is_served(app):
    client = app.test_client()
    page = client.get("/")
    assert page.mimetype == "text/html"
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|@import|url\(", page.text)
    assert "'unsafe" not in page.headers["Content-Security-Policy"]
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")
    for answer in (page, client.get("/model"), client.get("/nowhere"), post(app, b"")):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in answer.headers
    assert client.get("/model", headers={"Host": "rebound.example"}).status_code == 400
    assert client.get("/model", headers={"Host": "localhost:8000"}).get_json()["classes"] == NAMES
    assert post(app, photo(), headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    for path in ("/../../etc/passwd", "/segnet_scratch/serve/page.html", "/static/x", "/segment"):
        assert client.get(path).status_code in (404, 405)


@pytest.mark.parametrize(
    ("error", "status", "part"), [(RuntimeError("secret"), 500, "terminal"), (MemoryError, 503, "memory")]
)
def test_a_fault_of_the_program_is_told_without_its_inside(app, monkeypatch, error, status, part):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("segnet_scratch.serve.read_image", fail)
    answer = post(app, photo())
    assert answer.status_code == status
    assert part in answer.get_json()["error"]
    assert "secret" not in answer.text


def test_one_picture_at_a_time_goes_through_the_network():
    own = segmenter()
    busy, most, forward = [], [], own.forward

    def watched(*arguments):
        busy.append(threading.get_ident())
        most.append(len(busy))
        result = forward(*arguments)
        busy.remove(threading.get_ident())
        return result

    own.forward = watched
    app = application(own, STYLE, "m")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda side: post(app, photo(side, side)).get_json(), range(33, 45)))
    assert [answer["height"] for answer in answers] == list(range(33, 45))
    assert most == [1] * 12


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "model.safetensors"
    weights.save(path, segmenter().model, {"classes": NAMES, "size": [32, 40]})
    return path


def test_the_command(segnet, model_file, monkeypatch):
    class Server:
        effective_port = 8123

        def run(self):
            pass

    asked = []
    monkeypatch.setattr(waitress, "create_server", lambda app, **options: asked.append(options) or Server())
    done = segnet("serve", model_file, "--device", "numpy")
    assert (done.code, asked[0]["host"], asked[0]["port"]) == (0, "127.0.0.1", 8000)
    assert "http://127.0.0.1:8123/" in done.out
    assert "--samples 10" in done.out
    # Larger than any request: nothing of one goes to a file.
    assert asked[0]["inbuf_overflow"] > asked[0]["max_request_body_size"] > MAX_BYTES
    assert "everybody who reaches 0.0.0.0" in segnet("serve", model_file, "--device", "numpy", "--host", "0.0.0.0").out
    monkeypatch.undo()


def test_a_port_that_is_taken(segnet, model_file, server):
    port = server.server.server_port
    assert_error(segnet("serve", model_file, "--device", "numpy", "--port", port), 2, f"--port {port}", "in use")


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, driven by Selenium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed: pip install selenium")
    chromium, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    started.implicitly_wait(5)
    yield started
    started.quit()


@pytest.fixture
def address():
    """A server in a thread, as the command starts it."""
    found, ready = [], threading.Event()
    create = waitress.create_server
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waitress, "create_server", lambda *a, **o: found.append(create(*a, **o)) or found[0])
        arguments = segmenter(samples=2), STYLE, "model.safetensors", "127.0.0.1", 0

        def started(url):
            found.append(url)
            ready.set()

        thread = threading.Thread(target=serve, args=(*arguments, started), daemon=True)
        thread.start()
        assert ready.wait(10)
    yield found[1]
    found[0].close()
    found[0].task_dispatcher.shutdown()


def test_in_a_browser(browser, address, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    def one(selector):
        return browser.find_element(By.CSS_SELECTOR, selector)

    def pixels():
        code = "const c = document.getElementById('canvas');"
        code += "return [c.width, c.height, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
        width, height, *values = browser.execute_script(code)
        return np.array(values).reshape(height, width, 4)[..., :3]

    wait = WebDriverWait(browser, 20)
    (tmp_path / "street.png").write_bytes(photo())
    browser.get(address)
    wait.until(lambda _: "model.safetensors" in one("#model").text)
    one("#file").send_keys(str(tmp_path / "street.png"))
    wait.until(lambda _: one("#status").text.startswith("street: "))
    image = read_image(tmp_path / "street.png")
    labels = segmenter(samples=2)(image).labels
    shown = pixels()
    coloured = labels != 0  # a background is not
    wanted = 0.5 * STYLE.palette[labels] + 0.5 * image.mean(axis=2, keepdims=True)
    assert coloured.any()
    assert np.abs(shown - wanted)[coloured].max() < 20  # a JPEG of the photo
    assert np.abs(shown - wanted)[coloured].mean() < 4
    rows = browser.find_elements(By.CSS_SELECTOR, "#classes label span")
    assert sorted(row.text for row in rows) == sorted(NAMES[k] for k in np.unique(labels))  # tags are text
    # By keyboard alone: a class off, the uncertainty, the opacity.
    largest = int(np.bincount(labels[coloured]).argmax())
    one(f"#classes input[data-k='{largest}']").send_keys(Keys.SPACE)
    off = pixels()
    assert np.abs(off - image)[labels == largest].mean() < 4
    np.testing.assert_array_equal(off[labels != largest], shown[labels != largest])
    one("[value=overlay]").send_keys(Keys.ARROW_RIGHT)
    assert one("[value=uncertainty]").is_selected()
    assert one("#scale").is_displayed()
    one("#opacity").send_keys(Keys.END)
    assert one("#percent").text == "100 %"
    assert np.abs(pixels() - shown).mean() > 10
    assert re.search(r"^64 × 48, .* of which the network \d", one("#time").text)
    # Dropped, and no picture: the old one stays, and the fault is told.
    browser.execute_script(
        "const files = new DataTransfer(); files.items.add(new File(['no'], 'no.txt'));"
        "dispatchEvent(new DragEvent('drop', {dataTransfer: files, cancelable: true}))"
    )
    wait.until(lambda _: "not readable" in one("#problem").text)
    assert pixels().shape == (48, 64, 3)
    asked = json.loads(browser.execute_script("return JSON.stringify(performance.getEntries().map(e => e.name))"))
    assert [url for url in asked if url.startswith("http") and not url.startswith(address)] == []
    said = [entry["message"] for entry in browser.get_log("browser")]
    assert [text for text in said if "422" not in text] == []  # the status of the refusal, and no other complaint
