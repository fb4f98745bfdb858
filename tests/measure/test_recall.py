"""Plants, and what models that know everything, something and nothing recall of them."""

import numpy as np
import pytest
from readers import Amnesiac, Perfect

from sinkattn import measure
from sinkattn.measure.compare import LEAD, default_distances
from sinkattn.measure.recall import work

TEXT = np.random.default_rng(1).integers(32, 97, 5000)
FAR = [50, 100, 200]


def planted(**options):
    return measure.plant(TEXT, options.pop("distances", FAR), options.pop("rows", 6), **options)


@pytest.mark.parametrize("pairs", [True, False])
def test_every_plant_lies_where_it_is_said_to(pairs):
    plants = planted(pairs=pairs)
    assert plants.context.shape[0] == (6 if pairs else 18) and (plants.context[:, 0] == 256).all()
    for row in range(len(plants.context)):
        for index, distance in enumerate(plants.distances[row]):
            whole = np.concatenate([plants.context[row], plants.prompts[row, index], plants.answers[row, index]])
            asked = len(whole) - 16
            line = whole[asked - distance:asked - distance + 18]
            assert line.tolist() == plants.answers[row, index].tolist() + list(b"'\n")
            prompt = bytes(plants.prompts[row, index].astype(np.uint8))
            head = prompt[prompt.rindex(b"\n"):]
            assert bytes(whole[asked - distance - len(head):asked - distance].astype(np.uint8)) == head
        heads = [bytes(p.astype(np.uint8)).rsplit(b"\n", 1)[1] for p in plants.prompts[row]]
        assert len(set(heads)) == len(heads)
    assert sorted(set(plants.distances.ravel())) == FAR
    longer = planted(pairs=pairs, lead=40).context.shape[1] - plants.context.shape[1]
    assert longer == 36, "four tokens lead in any case"


def test_the_texts_hang_on_the_seed_alone():
    one, same, other = planted(), planted(), planted(seed=1)
    np.testing.assert_array_equal(one.context, same.context)
    assert (one.answers != other.answers).any()


def test_who_has_it_all_recalls_it_all():
    found = measure.recall(Perfect, planted())
    for points in (found.first, found.second, found.alone):
        assert [point.accuracy.mean for point in points] == [1, 1, 1]
        assert max(point.bits.mean for point in points) < 1e-6
    step = planted().step
    assert [p.distance for p in found.first] == FAR
    assert [p.distance for p in found.second] == [p.distance for p in found.alone] == [d + step for d in FAR]
    questions = measure.two_questions(Perfect, planted())
    assert questions.first.mean == questions.second.mean == questions.blind.mean == 1


def test_who_forgets_beyond_a_window_is_seen_to():
    """window 150: the plants at 50 and 100 are held while their 16 letters are asked, that at 200 is not."""
    found = measure.recall(lambda rows: Perfect(rows, 150), planted(), second=False)
    assert [point.accuracy.mean > 0.99 for point in found.first] == [True, True, False]
    assert found.first[2].accuracy.mean < 0.3 and found.second == found.alone == []


def test_who_knows_nothing_is_right_by_chance():
    found = measure.recall(Amnesiac, planted(rows=40))
    for point in [*found.first, *found.second, *found.alone]:
        assert point.accuracy.low <= found.chance == 1 / 26 <= point.accuracy.high
        assert point.bits.mean == pytest.approx(found.chance_bits, abs=1e-3)
    questions = measure.two_questions(Amnesiac, planted(rows=40))
    assert max(questions.first.mean, questions.second.mean, questions.blind.mean) < 0.1


def test_passkeys_one_a_row():
    found = measure.recall(Perfect, planted(pairs=False, rows=2, start=None))
    assert [(p.distance, p.accuracy.mean, p.accuracy.count) for p in found.first] == [(d, 1, 2) for d in FAR]


def test_two_questions_are_about_the_plants_that_were_chosen():
    """A window of 150 knows the two near plants, and with the far one in play it does not."""
    forgetful = lambda rows: Perfect(rows, 150)  # noqa: E731
    near = measure.two_questions(forgetful, planted(distances=[50, 90, 200]), among=[0, 1])
    assert near.first.mean == 1
    assert measure.two_questions(forgetful, planted(), among=[2, 1]).first.mean < 0.7


class Counting:
    """A context for the tokens that were read, as the demo's Progress."""

    def __init__(self):
        self.done = 0

    def advance(self, amount):
        self.done += amount


def test_the_work_is_what_is_read():
    progress, plants = Counting(), planted(rows=3)
    measure.recall(Amnesiac, plants, progress=progress)
    assert progress.done == work(plants, questions=False)
    measure.two_questions(Amnesiac, plants, progress=progress)
    assert progress.done == work(plants)


@pytest.mark.parametrize("budget", [32, 64, 128, 200, 300])
def test_default_distances_fit_and_reach_beyond(budget):
    distances = default_distances(budget, 512)
    plants = measure.plant(TEXT, distances, 1, lead=LEAD)
    assert plants.reach <= 512
    assert sum(distance > budget for distance in distances) >= (1 if budget == 300 else 2)


@pytest.mark.parametrize("call, error, words", [
    (lambda: planted(distances=[10]), ValueError, "begin at 10, expected 41 or more"),
    (lambda: planted(distances=[50, 60]), ValueError, "50 and 60 are 10 apart, expected 37"),
    (lambda: planted(distances=[]), ValueError, "expected at least one plant"),
    (lambda: planted(distances=[0]), ValueError, "distances is 0"),
    (lambda: planted(distances=[True]), TypeError, "distances is bool"),
    (lambda: planted(heads=[[1], [1], [1]]), ValueError, "as many different heads"),
    (lambda: planted(alphabet=[5, 5]), ValueError, "alphabet is expected"),
    (lambda: planted(rows=0), ValueError, "rows is 0"),
    (lambda: measure.plant(np.zeros((2, 2)), [50], 1), ValueError, "text has shape"),
    (lambda: measure.recall(Perfect, planted(pairs=False), second=True), ValueError, "second is True"),
    (lambda: measure.recall(Perfect, planted(), chunk=0), ValueError, "chunk is 0"),
    (lambda: measure.two_questions(Perfect, planted(pairs=False)), ValueError, "among is"),
    (lambda: measure.two_questions(Perfect, planted(), among=[0, 3]), ValueError, "among is"),
])
def test_bad_questions_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
