"""Who drafts, and how much, by measured times and measured acceptance."""

from switchkd.planner import Planner


def test_the_planner_picks_what_is_cheapest():
    dear_teacher = Planner()
    for role, one, four in (("teacher", 10.0, 11.0), ("student", 1.0, 1.2)):
        dear_teacher.took(role, 1, one)
        dear_teacher.took(role, 4, four)
    dear_teacher.saw("student", 0, right=90, total=100)
    assert dear_teacher.choose(0, 8) == ("student", 8)
    assert dear_teacher.choose(0, 3) == ("student", 3)  # no more than there is to write
    dear_teacher.saw("student", 20, right=0, total=10**6)  # drafts turned useless
    assert dear_teacher.choose(20, 8)[1] == 1
    even = Planner()
    for role in ("teacher", "student"):
        even.took(role, 1, 1.0)
        even.took(role, 8, 1.1)
    even.saw("student", 0, right=1, total=100)
    even.saw("teacher", 0, right=99, total=100)
    assert even.choose(0, 8) == ("teacher", 8)
    assert Planner(block=4, drafter="teacher").choose(0, 8) == ("teacher", 4)
    # A pass that captured a graph, and a decision that compiled a kernel, are soon forgotten.
    for what, first, usual in (
        ("teacher", 900.0, 1.0),
        ("student", 500.0, 0.1),
        ("decide", 2e3, 0.1),
    ):
        for seconds in (first, usual, usual):
            even.took(what, 1, seconds)
        even.took(what, 4, first)
        assert even.cost(what, 4) < 4 * usual
        even.took(what, 4, usual)
        even.took(what, 4, first)
        assert even.cost(what, 4) < 2 * usual
    even.took("rest", 1, 0.0)  # by clocks that do not agree to the last digit
    even.took("rest", 1, 0.5)
    assert even.cost("rest", 1) == 0.5
    # No student needed: the teacher alone, or with drafts of a student that is much cheaper.
    alone = Planner(costs={"teacher": 1.0, "student": 1.0})
    assert alone.choose(0, 8, settled=True) == ("teacher", 1)
    cheap = Planner(costs={"teacher": 1.0, "student": 0.01})
    assert cheap.choose(0, 8, settled=True)[0] == "student"
    assert cheap.choose(0, 8, settled=True, student_follows=False) == ("teacher", 1)
    # An earlier completion costs no draft, and is of use to the rows that follow it.
    past = Planner(costs={"teacher": 1.0, "student": 0.9})
    past.saw("history", 0, right=99, total=100)
    assert past.choose(0, 8, along=1.0)[0] == "history"
    assert past.choose(0, 8, along=0.01)[0] != "history"
