/** The clients that connected. */
import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';
import { formatRelative } from './format';
import { IState } from './objects';
import { sessionName } from './names';
import { Section } from './parts';

const FIRST_SESSIONS = 6;

/** All sessions, the newest first. */
export function Sessions(props: {
  state: IState;
  now: number;
  locale: string;
  trans: TranslationBundle;
}): JSX.Element {
  const { state, now, locale, trans } = props;
  const sessions = [...state.sessions.values()].reverse();
  const runs = [...state.runs.values()];
  return (
    <Section title={trans.__('Sessions')} count={sessions.length}>
      <ul className="jp-Tuft-list">
        {sessions.slice(0, FIRST_SESSIONS).map(session => {
          const own = runs.filter(run => run.session === session.id).length;
          const facts = [
            trans._n('%1 run', '%1 runs', own, own),
            formatRelative(Math.min(0, session.created - now), locale),
            session.sdk_version && trans.__('SDK %1', session.sdk_version)
          ];
          return (
            <li key={session.id} className="jp-Tuft-entry">
              <div className="jp-Tuft-entryHead">
                <b className="jp-Tuft-ellipsis" title={session.id}>
                  {sessionName(session)}
                </b>
                <span
                  className={`jp-Tuft-phase jp-mod-${
                    session.finished ? 'closed' : 'open'
                  }`}
                >
                  {session.finished ?? trans.__('open')}
                </span>
              </div>
              <div className="jp-Tuft-entryFacts">
                {facts.filter(Boolean).join(' · ')}
              </div>
            </li>
          );
        })}
      </ul>
    </Section>
  );
}
