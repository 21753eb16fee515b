"""Web pages to text."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tozan.data.webpage import webpage_text

PAGE = """<!DOCTYPE html><html><head><title>no</title><style>no</style></head><body>
<nav>no</nav><div class="related" role="navigation">no<br><img src="x"><div>no</div></div>
<h1>Title&nbsp;1<a class="headerlink" href="#">no</a></h1>
<p>A <b>bold</b>
   move&hellip; &lt;tag&gt; &#23665;</p><p>Second<br>line
<ul><li>one<li><p>two</p></ul>
<pre>def f(x):
    return  x
</pre>
<table><tr><th>a<th>b</tr><tr><td>c</td><td>d</td></tr></table>
<script>if (a < b) no()</script><footer>no</footer>
tail</body></html>"""


def test_a_page():
    assert webpage_text(PAGE) == (
        "Title 1\n\nA bold move… <tag> 山\n\nSecond\nline\n\n- one\n- two\n\n"
        "def f(x):\n    return  x\n\na\tb\nc\td\n\ntail\n"
    )


def test_pages_without_text():
    assert webpage_text("") == webpage_text("<html><head><title>x</title></head><body></body></html>") == ""


@given(
    st.lists(st.sampled_from(["<p>", "</p>", "<div id=toc>", "</div>", "a", "<", "<!--", "]]>", "<![x", "<td", "&#1;"]))
)
@settings(max_examples=200, deadline=None)
def test_no_page_breaks_the_reader(parts: list[str]):
    webpage_text("".join(parts))
