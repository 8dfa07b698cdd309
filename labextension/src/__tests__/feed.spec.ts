import { ApiError, IStateAnswer } from '../api';
import { Feed } from '../feed';
import { apply, emptyState, fromSnapshot, toSnapshot } from '../model';
import {
  emptyAnswer,
  FakeApi,
  goldenFeed,
  goldenState,
  hidePage,
  READY,
  settle
} from './support';

const viewer = {};

describe('the feed', () => {
  let api: FakeApi;
  let feed: Feed;

  beforeEach(() => {
    jest.useFakeTimers();
    api = new FakeApi();
    feed = new Feed(api);
  });

  afterEach(() => {
    feed.dispose();
    hidePage(false);
    jest.useRealTimers();
  });

  async function live(): Promise<void> {
    feed.look(viewer, true);
    await settle();
    api.socket.accept();
  }

  it('asks for nothing while nobody looks', async () => {
    await settle();
    expect([api.asked, api.sockets.length]).toEqual([0, 0]);
    expect(feed.connection).toBe('asleep');
  });

  it('starts from a snapshot and takes the records after it', async () => {
    const records = goldenFeed();
    await live();
    expect(feed.connection).toBe('live');
    expect(api.socket.since).toBe(0);
    api.socket.send({ type: 'records', records: records.slice(0, 20) });
    api.socket.send({ type: 'records', records: records.slice(15) });
    expect(toSnapshot(feed.state)).toEqual(goldenState());
  });

  it('tells of every message', async () => {
    await live();
    let told = 0;
    feed.changed.connect(() => (told += 1));
    api.socket.send({ type: 'status', status: { ...READY, ready: false } });
    api.socket.send({ type: 'gauges', time: 5, cpu: 61 });
    expect(told).toBe(2);
    expect(feed.status?.ready).toBe(false);
    expect(feed.gauges?.cpu).toBe(61);
  });

  it('reads the time from the server', async () => {
    await live();
    api.socket.send({ type: 'gauges', time: 1000 });
    jest.advanceTimersByTime(2000);
    expect(feed.now()).toBeCloseTo(1002, 1);
  });

  it('closes its socket while hidden and then asks for what it missed', async () => {
    await live();
    api.socket.send({ type: 'records', records: goldenFeed().slice(0, 12) });
    feed.look(viewer, false);
    expect(api.socket.closed).toBe(true);
    expect(feed.connection).toBe('asleep');
    await live();
    expect(api.asked).toBe(1);
    expect(api.sockets.map(socket => socket.since)).toEqual([0, 12]);
  });

  it('closes its socket while the page is hidden', async () => {
    await live();
    hidePage(true);
    expect(api.socket.closed).toBe(true);
    hidePage(false);
    await settle();
    expect(api.sockets.length).toBe(2);
  });

  it('does not listen to a socket that it has closed', async () => {
    await live();
    const old = api.socket;
    feed.look(viewer, false);
    await live();
    old.send({ type: 'records', records: goldenFeed() });
    old.lose();
    expect(feed.state.n).toBe(0);
    expect(feed.connection).toBe('live');
  });

  it('takes a new snapshot after a lost connection', async () => {
    await live();
    api.socket.send({ type: 'records', records: goldenFeed() });
    api.socket.lose();
    expect(feed.connection).toBe('lost');
    expect(feed.retryAt).toBeGreaterThan(Date.now());
    jest.advanceTimersByTime(1500);
    await settle();
    expect(api.asked).toBe(2);
    expect(api.socket.since).toBe(0);
    expect(toSnapshot(feed.state)).toEqual(
      toSnapshot(fromSnapshot((await api.answer()).state))
    );
  });

  it('waits longer each time while the server does not answer', async () => {
    api.answer = () =>
      Promise.reject(new ApiError('unreachable', 'no connection'));
    feed.look(viewer, true);
    const waits: number[] = [];
    for (let i = 0; i < 8; i++) {
      await settle();
      waits.push(feed.retryAt! - Date.now());
      jest.advanceTimersByTime(waits[i]);
    }
    [1, 2, 4, 8, 16, 30, 30, 30].forEach((seconds, i) => {
      expect(waits[i]).toBeGreaterThanOrEqual(seconds * 750);
      expect(waits[i]).toBeLessThanOrEqual(seconds * 1250);
    });
  });

  it('begins anew when a server that reports each second falls silent', async () => {
    await live();
    const silent = api.socket;
    for (let second = 0; second < 90; second++) {
      jest.advanceTimersByTime(1000);
      silent.send({ type: 'gauges', time: second });
    }
    expect(feed.connection).toBe('live');
    jest.advanceTimersByTime(46_000);
    expect(feed.connection).toBe('lost');
    expect(silent.closed).toBe(true);
    jest.advanceTimersByTime(1500);
    await settle();
    expect([api.asked, api.sockets.length]).toEqual([2, 2]);
  });

  it('tells what a server says of another one that does not answer', async () => {
    const problem = 'the service cannot be reached';
    api.answer = () => Promise.reject(new ApiError('unreachable', problem));
    feed.look(viewer, true);
    await settle();
    expect([feed.connection, feed.problem]).toEqual(['lost', problem]);
    api.answer = async () => emptyAnswer();
    feed.retry();
    await settle();
    api.socket.accept();
    api.socket.lose();
    expect([feed.connection, feed.problem]).toEqual(['lost', '']);
  });

  it('takes the state of a server that was started again while nobody looked', async () => {
    const status = { ...READY, started: 1 };
    api.answer = async () => ({ state: goldenState(), status });
    await live();
    api.socket.send({ type: 'status', status });
    feed.look(viewer, false);
    api.answer = async () => ({
      state: { ...emptyAnswer().state, n: goldenState().n },
      status: { ...READY, started: 2 }
    });
    await live();
    api.socket.send({ type: 'status', status: { ...READY, started: 2 } });
    await settle();
    expect([api.asked, feed.state.runs.size]).toEqual([2, 0]);
  });

  it('tries at once when asked to', async () => {
    api.answer = () => Promise.reject(new ApiError('missing', '404'));
    feed.look(viewer, true);
    await settle();
    expect(feed.connection).toBe('missing');
    feed.retry();
    await settle();
    expect(api.asked).toBe(2);
  });

  it.each(['missing', 'forbidden'] as const)(
    'says that the server extension is %s',
    async reason => {
      api.answer = () => Promise.reject(new ApiError(reason, reason));
      feed.look(viewer, true);
      await settle();
      expect(feed.connection).toBe(reason);
      expect(api.sockets.length).toBe(0);
    }
  );

  it('loses no record while it takes the snapshot that the server asks for', async () => {
    const records = goldenFeed();
    await live();
    api.socket.send({ type: 'resync' });
    let give: (answer: IStateAnswer) => void = () => undefined;
    api.answer = () => new Promise(done => (give = done));
    api.socket.send({ type: 'resync' });
    const early = records.slice(0, 20).reduce((state, record) => {
      apply(state, record);
      return state;
    }, emptyState());
    api.socket.send({ type: 'records', records: records.slice(15, 25) });
    api.socket.send({ type: 'records', records: records.slice(25) });
    await settle();
    expect(feed.state.n).toBe(0);
    give({ state: toSnapshot(early), status: READY });
    await settle();
    expect(toSnapshot(feed.state)).toEqual(goldenState());
    expect(api.sockets.length).toBe(1);
    expect(feed.connection).toBe('live');
  });

  it('leaves nothing behind', async () => {
    await live();
    api.socket.lose();
    feed.dispose();
    jest.advanceTimersByTime(60000);
    await settle();
    expect(api.sockets.length).toBe(1);
    expect(jest.getTimerCount()).toBe(0);
  });
});
