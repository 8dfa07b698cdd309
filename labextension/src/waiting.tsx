/** What waits and why, and the newest lines of the server's log. */
import * as React from 'react';
import { ILogLine, IWaiting } from './api';
import { Section } from './parts';
import { IShown } from './shown';

/** The runs whose requests wait or run, those that wait longest first. */
export function Queue(
  props: IShown & { queue: readonly IWaiting[] }
): JSX.Element | null {
  const { queue, names, trans } = props;
  if (queue.length === 0) {
    return null;
  }
  return (
    <Section title={trans.__('Queue')} count={queue.length}>
      <ol className="jp-Tuft-list">
        {queue.map(({ run, pending, why }, place) => (
          <li key={run} className="jp-Tuft-entry">
            <div className="jp-Tuft-entryHead">
              <b className="jp-Tuft-ellipsis" title={run}>
                {place + 1}. {names.get(run) ?? run}
              </b>
              <span className="jp-Tuft-entryFacts">
                {trans._n('%1 request', '%1 requests', pending, pending)}
              </span>
            </div>
            <div className="jp-Tuft-entryFacts">{why}</div>
          </li>
        ))}
      </ol>
    </Section>
  );
}

/** The end of the log. Stays at the newest line unless somebody has scrolled away from it. */
export function Log(
  props: IShown & { lines: readonly ILogLine[] }
): JSX.Element | null {
  const { lines, trans } = props;
  const box = React.useRef<HTMLDivElement>(null);
  const follows = React.useRef(true);
  React.useEffect(() => {
    if (box.current && follows.current) {
      box.current.scrollTop = box.current.scrollHeight;
    }
  }, [lines]);
  if (lines.length === 0) {
    return null;
  }
  return (
    <Section title={trans.__('Log')}>
      <div
        ref={box}
        className="jp-Tuft-log"
        role="log"
        aria-label={trans.__('Newest lines of the server log')}
        aria-live="off"
        tabIndex={0}
        onScroll={({ currentTarget: node }) => {
          const left = node.scrollHeight - node.scrollTop - node.clientHeight;
          follows.current = left < 8;
        }}
      >
        {lines.map(({ n, time, level, text }) => (
          <div key={n} className={`jp-mod-${level}`}>
            <time>{new Date(time * 1000).toLocaleTimeString()}</time> {text}
          </div>
        ))}
      </div>
    </Section>
  );
}
