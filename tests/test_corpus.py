"""The corpus: text out of every format, and documents that stay where they are."""

import gzip
import hashlib
import io
import json
import lzma
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from modeling_hope.training import corpus, corpus_packages
from modeling_hope.training.corpus import build, split_of, within
from modeling_hope.training.corpus_packages import PackageFolder
from modeling_hope.training.corpus_sources import Source, all_files, dictionary, pages
from modeling_hope.training.debian import Apt, Mirror, Package, files_in, packages, resolve
from modeling_hope.training.dictionary_text import by_first_letters, entries, read_foldoc, read_gcide
from modeling_hope.training.manual_text import read_man, read_pod
from modeling_hope.training.markup_text import read_html, read_mallard
from modeling_hope.training.plain_text import Block, clean, join, read_text, without_empty_sections


COPYRIGHT = b"Files: *\nCopyright: 2026, Ada\nLicense: GPL-2+\n\nFiles: debian/*\nCopyright: Bob\nLicense: MIT\n"
PROSE = (
    "The {} of this machine is described at length in a sentence that nobody else has written before. It is long enough to be kept. "
    "Nothing here says anything of levers, of ropes, or of anybody who ever pulled one, and it goes on for a while."
)


def text_of(blocks):
    return join(without_empty_sections(clean(blocks)))


def make_deb(path, files, packing=lzma.compress, suffix="xz"):
    """A Debian package that holds `files`."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("./link")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere"
        archive.addfile(link)
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{suffix}": packing(tar.getvalue())}
    made = b"!<arch>\n"
    for name, data in members.items():
        made += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    path.write_bytes(made)


def page(*words):
    return "".join(f"<p>{PROSE.format(word)}</p>" for word in words).encode()


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Two packages, a mirror of them in place of apt, and how often each was fetched."""
    deb = tmp_path / "machines_1.0_all.deb"
    shared = {f"usr/share/doc/machines/{n}.html": page("screw", f"wheel {n}") for n in range(40)}
    make_deb(deb, {"usr/share/doc/machines/copyright": COPYRIGHT, **shared})
    wheel = tmp_path / "speeches-2.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("speeches/1.txt", PROSE.format("lever") + "\n\n" + PROSE.format("SCREW").upper())
        archive.writestr("speeches-2.0.dist-info/METADATA", "These texts are in the public domain.")
    fetches = []

    class Index:
        def find(self, name):
            files = {"machines": Package("machines", "1.0", deb.name, corpus_packages.sha256(deb))}
            return files.get(name)

        def fetch(self, package, directory):
            fetches.append(package.name)
            return (directory / deb.name).write_bytes(deb.read_bytes()) and directory / deb.name

    def fetch_wheel(requirement, directory):
        fetches.append(requirement)
        return (directory / wheel.name).write_bytes(wheel.read_bytes()) and directory / wheel.name

    read_pages = pages((r"usr/share/doc/machines/(.+)\.html", read_html))
    sources = {
        "speeches": Source(
            "speeches",
            "public domain",
            "in the public domain",
            pages((r"speeches/(.+)\.txt", read_text)),
            "speeches==2.0",
            registry="pypi",
            copyright_file=r".*METADATA",
            sha256=corpus_packages.sha256(wheel),
        ),
        "machines": Source("machines", "GPL-2.0-or-later", all_files("GPL-2+"), read_pages, "machines"),
    }
    monkeypatch.setattr(corpus, "SOURCES", sources)
    monkeypatch.setattr(corpus_packages, "fetch_wheel", fetch_wheel)
    monkeypatch.setattr(PackageFolder, "index", lambda self: Index())
    return tmp_path, sources, fetches


def lines_of(out):
    return {
        path.relative_to(out).as_posix(): [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(out.glob("*/*.jsonl"))
        if path.parent.name in corpus.SPLITS
    }


def make(world, out="out", sources=("machines", "speeches"), **options):
    home = world[0]
    return build(home / out, PackageFolder(home / "cache" / "packages"), sources, say=lambda line: None, **options)


def test_html_is_read_as_a_person_reads_it():
    made = read_html("""<html><head><title>No</title><style>p{}</style></head><body>
      <div class="sphinxsidebar"><p>Navigation</p></div><nav>Next</nav>
      <h1>Levers<a class="headerlink">¶</a></h1><p>One  lever<br>moves <b>much</b>.<p>Two move&nbsp;more.
      <p><strong>Kinds</strong></p><ul><li>first<li><p>second</p></ul><ol><li>push</li><li>wait</li></ol>
      <dl><dt>fulcrum</dt><dd><p>where it turns</p><p>Always one.</p></dd><dt>arm<dt>beam<dd>what turns</dl>
      <pre>  lift(<span>weight</span>)
      if heavy: ask</pre>
      <table><tr><th>name<th>use<tr><td>oak<td>beams</table><h2>Nothing here</h2><script>if (a<b) x()</script>
      <font><font><p>never closed</body></html>""")
    assert text_of(made) == (
        "Levers\n\nOne lever moves much.\n\nTwo move more.\n\nKinds\n\n- first\n- second\n1. push\n2. wait\n\n"
        "fulcrum: where it turns\n\nAlways one.\n\narm, beam: what turns\n\nlift(weight)\n    if heavy: ask\n\n"
        "name: use\noak: beams\n\nNothing here\n\nnever closed"
    )
    assert clean(read_html("<b>" * 5000 + "deep")) == [Block("deep")]
    mallard = '<page xmlns="http://projectmallard.org/1.0/"><info><desc>No</desc></info><title>Go <gui>on</gui></title>'
    steps = "<steps><item><p>Press <key>A</key>.</p></item><item><p>Wait.</p></item></steps><comment><p>x</p></comment>"
    assert text_of(read_mallard(f"{mallard}{steps}</page>")) == "Go on\n\n1. Press A.\n2. Wait."


def test_pod_and_man_pages_lose_their_codes_and_nothing_else():
    pod = (
        "=encoding utf8\n\n=head1 NAME X<index>\n\nB<lift> - I<lifts> C<< $a->{b} >> E<lt>hereE<gt>, see L<perlop/Terms>,"
        " L<this|http://a.b> and L<perlfunc>\n\n=over 4\n\n=item *\n\nfirst\n\n=item lift HEIGHT\n\nLifts.\n\n=back\n\n"
        "    lift(weight);\n\n    drop weight;\n\n=begin html\n\n<b>no</b>\n\n=end html\n\n=cut\n\nprogram\n\n=head2 Empty\n"
    )
    assert text_of(read_pod(pod)) == (
        "NAME\n\nlift - lifts $a->{b} <here>, see Terms in perlop, this and perlfunc\n\n- first\n\nlift HEIGHT: Lifts.\n\n"
        "lift(weight);\n\ndrop weight;"
    )
    man = (
        '.de Sp\n.if t .sp\n..\n.TH LIFT 3\n.SH "NAME"\n.IX Header "NAME"\nlift \\- \\fBlifts\\fR the \\s-1WORLD\\s0\n'
        '.PP\nSay \\*(L"up\\*(R".\n.Vb 2\n\\&    lift(weight);\n\\&    drop weight;\n.Ve\n.ie n .IP """drop""" 4\n'
        '.el .IP "\\f(CWdrop\\fR" 4\nDrops\nit.\n.IP "\\(bu" 4\nan item\n.TP\n.B hold\nHolds it.\n'
    )
    assert text_of(read_man(man)) == (
        'NAME\n\nlift - lifts the WORLD\n\nSay "up".\n\nlift(weight);\ndrop weight;\n\ndrop: Drops it.\n\n- an item\n\nhold: Holds it.'
    )


def test_dictionaries_are_read_by_their_index():
    zulu = "Abb'e \\Ab\"b['e]`\\ ([.a]b\"b[asl]`), n. [F. abb['e].\n   See {Abbot}.] A c[oe]ur na[\"i]f.\n   [1913 Webster] Abz\n   Abx\n\n"
    second = "abscissa\n\n   <mathematics> The horizontal {axis}\n   of a graph.\n\n   (1997-07-08)\n\n"
    index = f"00-database-info\tA\tB\nabbe\tA\t{'B' + 'A'}\nabscissa\tA\tA\n"
    assert [text for _, text in entries(gzip.compress(b"x" * 64), index)] == ["", "x" * 64]
    assert text_of(read_gcide(zulu)) == "Abb'e, n. [F. abbé. See Abbot.] A cœur naïf."
    assert text_of(read_foldoc(second)) == "abscissa: (mathematics) The horizontal axis of a graph."
    assert by_first_letters([("abbe", zulu), ("abscissa", second), ("!", "!x y")]) == {
        "ab": [zulu, second],
        "xy": ["!x y"],
    }
    places = "abbe\tA\tBB\n"  # 65 bytes
    files = [
        ("usr/share/dictd/d.dict.dz", gzip.compress(b"word\n\n   " + b"w" * 56)),
        ("usr/share/dictd/d.index", places.encode()),
    ]
    assert [document.name for document in dictionary(read_foldoc)(files)] == ["wo"]


def test_plain_text_keeps_paragraphs_and_what_is_readable():
    text = "A title\n=======\n\nLines that\nbelong together.\n\n  name     use\n  oak      beams\n\nif heavy:\n    ask()\nlift()\n"
    assert text_of(read_text(text)) == (
        "A title\n\nLines that belong together.\n\nname     use\noak      beams\n\nif heavy:\n    ask()\nlift()"
    )
    kept = clean([Block("caf\u0065\u0301\u00a0\u200bau lait"), Block("0x00 0x7f 0x1b 12 99 --"), Block("日本語の文章")])
    assert kept == [Block("café au lait")]
    assert not clean([Block("line of code\n" * 80, "code"), Block("\ufffd odd"), Block("- ", "item")])
    sections = [
        Block("A", "heading", 1),
        Block("B", "heading", 2),
        Block("C", "heading", 2),
        Block("words"),
        Block("D", "heading", 1),
    ]
    assert [block.text for block in without_empty_sections(sections)] == ["A", "C", "words"]


def test_packages_are_found_and_read_without_installing_them(tmp_path):
    index = (
        "Package: linux-doc\nVersion: 6.2\nDepends: libjs-x (>= 1), linux-doc-6.2 (= 6.2-1)\nFilename: a.deb\nSHA256: 00\n\n"
        "Package: linux-doc-6.2\nVersion: 6.2-1\nFilename: pool/b.deb\nDescription: long\n SHA256: no\nSHA256: {}\n"
    )
    files = {"usr/share/doc/a/copyright": COPYRIGHT, "usr/share/doc/a/b.html": b"<p>words</p>"}
    (tmp_path / "pool").mkdir()
    for suffix, packing in (("gz", gzip.compress), ("xz", lzma.compress)):
        make_deb(tmp_path / "pool/b.deb", files, packing, suffix)
        assert dict(files_in(tmp_path / "pool/b.deb")) == files
    index = index.format(hashlib.sha256((tmp_path / "pool/b.deb").read_bytes()).hexdigest())
    assert [package.name for package in packages(index)] == ["linux-doc", "linux-doc-6.2"]
    folder = tmp_path / "dists/stable/main/binary-amd64"
    folder.mkdir(parents=True)
    (folder / "Packages.gz").write_bytes(gzip.compress(index.encode()))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        mirror = Mirror(url)
        found = resolve(mirror, "linux-doc", r"linux-doc-[\d.]+")
        assert (found.name, found.version) == ("linux-doc-6.2", "6.2-1")
        assert dict(files_in(mirror.fetch(found, folder))) == files
        for name, real, reason in (
            ("absent", None, "no Debian package absent"),
            ("linux-doc", "x.*", "depends on none"),
        ):
            with pytest.raises(ValueError, match=reason):
                resolve(mirror, name, real)
        with pytest.raises(ValueError, match=r"is 'sid' one of its suites"):
            Mirror(url, "sid")
        with pytest.raises(ValueError, match=r"did not give pool/none\.deb"):
            mirror.fetch(Package("none", "1", "pool/none.deb", ""), tmp_path)
        server.shutdown()
    with pytest.raises(ValueError, match="cannot be reached"):
        Mirror(url)
    (tmp_path / "x.deb").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no Debian package"):
        list(files_in(tmp_path / "x.deb"))


def test_the_corpus_has_every_paragraph_once_and_is_the_same_each_time(world):
    made = make(world)
    home, _, fetches = world
    found = lines_of(home / "out")
    texts = [line["text"] for lines in found.values() for line in lines]
    assert sum(text.casefold().count(PROSE.format("screw").casefold().strip()) for text in texts) == 1
    assert made["total"]["documents"] == 41 and made["sources"]["machines"]["repeated_mb"] > 0
    assert {line["licence"] for lines in found.values() for line in lines} == {"public domain", "GPL-2.0-or-later"}
    assert (home / "out/licences/machines.txt").read_bytes() == COPYRIGHT
    table = (home / "out/corpus.md").read_text()
    assert "| machines | GPL-2.0-or-later | 40 |" in table and "| train |" in table
    assert not (home / "out/.partial").exists()
    # Once fetched, no network is needed; in another place, from the same packages, every byte is the same.
    again = make(world, "again")
    assert again == made and lines_of(home / "again") == found and fetches == ["speeches==2.0", "machines"]
    stamp = (home / "out/corpus.json").stat().st_mtime_ns
    assert make(world) == made and (home / "out/corpus.json").stat().st_mtime_ns == stamp


def test_a_document_stays_in_its_split(world):
    make(world)
    whole = {
        (line["source"], line["document"]): name.split("/")[0]
        for name, lines in lines_of(world[0] / "out").items()
        for line in lines
    }
    for out, options in (
        ("one", {"sources": ["machines"]}),
        ("skipped", {"skip": ["speeches"]}),
        ("small", {"limit_mb": 0.004}),
    ):
        made = make(world, out, **options)
        part = {
            (line["source"], line["document"]): name.split("/")[0]
            for name, lines in lines_of(world[0] / out).items()
            for line in lines
        }
        assert part.items() <= whole.items() and part
        assert made["total"]["mb"] <= options.get("limit_mb", 1)
    assert "Left out by `--skip`: speeches." in (world[0] / "skipped/corpus.md").read_text()
    shares = [split_of("source", str(number)) for number in range(20_000)]
    for split, share in corpus.SPLITS.items():
        assert abs(shares.count(split) / len(shares) - share) < 0.01
    with pytest.raises(ValueError, match="below the size of every document"):
        within([corpus.Text("words", "a", "b", "c")], 2)


def test_what_cannot_be_had_is_named_and_nothing_half_made_is_taken_for_whole(world, monkeypatch):
    home, sources, fetches = world
    lacking = Source("engines", "GPL-2.0-or-later", "", sources["machines"].read, "engines")
    sources["engines"] = lacking
    with pytest.raises(ValueError, match=r"engines: no Debian package engines(.|\n)*--skip engines"):
        make(world, sources=list(sources))
    assert not (home / "out").exists()
    make(world, sources=list(sources), skip=["engines"])
    assert fetches == ["speeches==2.0", "machines"]

    # A run that is cut off while it writes leaves no corpus, and the next one goes on from what was read.
    monkeypatch.setattr(corpus, "table", lambda made: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(world, "cut")
    assert not (home / "cut/corpus.json").exists() and (home / "cut/.partial").exists()
    monkeypatch.undo()


def test_damage_is_found(world):
    home, sources, _ = world
    made = make(world)
    shard = next((home / "out/train").glob("machines*"))
    shard.write_text("{}\n")
    assert (
        make(world) == made
        and corpus_packages.sha256(shard) == made["sources"]["machines"]["shards"][f"train/{shard.name}"]
    )
    deb = home / "cache/packages/machines_1.0_all.deb"
    deb.write_bytes(deb.read_bytes()[:-1])
    with pytest.raises(ValueError, match="its checksum differs"):
        make(world)
    deb.unlink()
    assert make(world) == made
    sources["speeches"] = Source(**{**vars(sources["speeches"]), "sha256": "00"})
    with pytest.raises(ValueError, match=r"speeches(.|\n)*not 00 as announced"):
        build(home / "new", PackageFolder(home / "other"), ["speeches"], say=lambda line: None)
    assert not list((home / "other").iterdir())
    sources["machines"] = Source(**{**vars(sources["machines"]), "stated": all_files("MIT")})
    for path in (home / "cache/documents").glob("machines*"):
        path.unlink()
    with pytest.raises(ValueError, match="does not state the licence GPL"):
        make(world, "licence")
    for names, options, reason in (
        (["x"], {}, "No source is called x"),
        (["machines"], {"skip": ["machines"]}, "No source is left"),
        (["machines"], {"limit_mb": 0}, "must be above 0"),
    ):
        with pytest.raises(ValueError, match=reason):
            make(world, sources=names, **options)


def test_without_apt_a_mirror_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(Apt, "is_here", staticmethod(lambda: False))
    with pytest.raises(ValueError, match="--mirror URL"):
        PackageFolder(tmp_path).index()
