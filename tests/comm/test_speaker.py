from tozan.comm.speaker import Speaker


def test_the_first_that_can_be_reached_speaks_and_no_more_than_three_listen():
    speakers = [Speaker(may=number != 1) for number in range(6)]
    said = [speaker.listen("127.0.0.1") if speaker.may else "" for speaker in speakers]
    for rank, speaker in enumerate(speakers):
        speaker.introduce(said, rank)
    assert [speaker.stays for speaker in speakers] == [True, False, True, True, False, False]
    for first in (0, 2, 3):
        assert [speaker.speaks() for speaker in speakers[first:]] == [True, *[False] * (5 - first)]
        speakers[first].close()
    assert [speaker.speaks() for speaker in speakers[4:]] == [True, True]


def test_one_that_cannot_listen_speaks_all_the_same():
    speaker = Speaker(may=True)
    assert speaker.listen("192.0.2.1") == ""  # an address that no machine has
    speaker.introduce(["", ""], 1)
    assert speaker.speaks()
    assert not speaker.stays
