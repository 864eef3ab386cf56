import pytest

from posttrain.errors import UserError
from posttrain.serving.catalogue import named_folders
from posttrain.serving.server import bind, check_open


def test_a_folder_is_called_by_its_last_part_or_as_one_likes():
    given = ["runs/round-2/value", "old=runs/round-1/value", "runs/a=b/late"]
    assert named_folders("guide", given) == {
        "value": "runs/round-2/value",
        "old": "runs/round-1/value",
        "late": "runs/a=b/late",
    }


@pytest.mark.parametrize("given", [["a/value", "b/value"], ["x=a", "x=b"], [""], [".."], ["a/b c"]])
def test_a_name_is_one_word_and_nobody_else_s(given):
    with pytest.raises(UserError, match="^guide: "):
        named_folders("guide", given)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.3.2.1"])
def test_this_machine_needs_no_key(host):
    check_open(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_others_need_one(host):
    check_open(host, "key")
    with pytest.raises(UserError, match="^host: "):
        check_open(host, None)


def test_an_empty_key_is_none():
    with pytest.raises(UserError, match="^api-key: "):
        check_open("127.0.0.1", " ")


def test_a_port_that_is_taken_is_a_mistake_of_the_user():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(UserError, match="^port: cannot serve on"):
            bind("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_refused(port):
    with pytest.raises(UserError, match="^port: must be between"):
        bind("127.0.0.1", port)
