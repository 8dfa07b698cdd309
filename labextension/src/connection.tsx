/** How the page stands to the server, and what to do where something is missing. */
import { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';
import { IPlacement, IStatus } from './api';
import { Code } from './parts';
import { IFineTuning, VERSION } from './tokens';

type Level = 'ok' | 'busy' | 'bad' | 'off';

/** Props of {@link ConnectionHead}. */
export interface IConnectionProps {
  source: IFineTuning;
  onRetry: () => void;
  trans: TranslationBundle;
}

/** The dot, the sentence and the line of facts at the top of the panel. */
export function ConnectionHead(props: IConnectionProps): JSX.Element {
  const { source, trans } = props;
  const { connection, status } = source;
  const [level, text] = judge(source, trans);
  const stuck =
    connection === 'lost' ||
    connection === 'missing' ||
    connection === 'unusable' ||
    connection === 'forbidden';
  return (
    <header className="jp-Tuft-head">
      <div className="jp-Tuft-headLine">
        <span className={`jp-Tuft-dot jp-mod-${level}`} />
        <span role="status" className="jp-Tuft-headText">
          {text}
        </span>
        {stuck && (
          <button className="jp-Tuft-textButton" onClick={props.onRetry}>
            {trans.__('Try now')}
          </button>
        )}
      </div>
      {status && <Facts status={status} trans={trans} />}
      {connection === 'lost' && source.problem && (
        <div className="jp-Tuft-trouble">
          <p>{source.problem}</p>
          <p>{trans.__('This page connects by itself when it does.')}</p>
        </div>
      )}
      {connection === 'lost' && !source.problem && (
        <div className="jp-Tuft-trouble">
          <p>
            {trans.__(
              'Start it again where it ran; this page then connects by itself, and what was training goes on:'
            )}
          </p>
          <Code lines={['jupyter lab']} trans={trans} />
        </div>
      )}
      {connection === 'forbidden' && (
        <div className="jp-Tuft-trouble">
          <p>
            {trans.__(
              'Log in with an account that may, or ask the owner of the server to let yours read “tuft”.'
            )}
          </p>
        </div>
      )}
      {connection === 'unusable' && (
        <div className="jp-Tuft-trouble">
          <p>{source.problem}</p>
          <p>
            {trans.__(
              'Mend it where the notebook server runs, then restart the server. What is in force:'
            )}
          </p>
          <Code lines={['tuft config --show']} trans={trans} />
        </div>
      )}
      {connection === 'live' && status && (
        <Trouble status={status} trans={trans} />
      )}
    </header>
  );
}

function judge(source: IFineTuning, trans: TranslationBundle): [Level, string] {
  const { connection, status } = source;
  switch (connection) {
    case 'asleep':
      return ['off', trans.__('Paused while nobody looks')];
    case 'connecting':
      return ['busy', trans.__('Connecting…')];
    case 'lost':
      return [
        'bad',
        source.problem
          ? trans.__('The fine-tuning service does not answer')
          : trans.__('The notebook server does not answer')
      ];
    case 'missing':
      return ['off', trans.__('Fine-tuning is not set up on this server')];
    case 'unusable':
      return ['bad', trans.__('Fine-tuning is not set up correctly')];
    case 'forbidden':
      return ['bad', trans.__('You may not see fine-tuning on this server')];
    case 'live':
      break;
  }
  if (!status) {
    return ['busy', trans.__('Connecting…')];
  }
  if (!status.backend.installed) {
    return ['bad', trans.__('No training backend is installed')];
  }
  if (
    status.models.length > 0 &&
    status.models.every(model => model.state === 'failed')
  ) {
    return ['bad', trans.__('The model could not be loaded')];
  }
  if (status.problem) {
    return ['bad', trans.__('Nothing new is accepted')];
  }
  if (status.ready) {
    return ['ok', trans.__('Ready')];
  }
  return [
    'busy',
    status.waiting_for
      ? trans.__('Waiting: %1', status.waiting_for)
      : trans.__('Starting…')
  ];
}

function Facts(props: {
  status: IStatus;
  trans: TranslationBundle;
}): JSX.Element {
  const { status, trans } = props;
  const ready = status.models.filter(model => model.state === 'ready');
  const several = (status.placements ?? []).length > 1;
  return (
    <dl className="jp-Tuft-facts">
      <div>
        <dt>{trans.__('Model')}</dt>
        <dd>
          {(ready.length ? ready : status.models)
            .map(model => model.name)
            .join(', ') || '–'}
        </dd>
      </div>
      {(status.placements ?? []).map(placed => (
        <div key={placed.model}>
          <dt>{trans.__('GPUs')}</dt>
          <dd title={`${placed.model}: ${placed.mode}`}>
            {several && `${placed.model}: `}
            {meshWords(placed, trans)}
          </dd>
        </div>
      ))}
      <div>
        <dt>{trans.__('You are')}</dt>
        <dd>{status.tenant}</dd>
      </div>
      <div>
        <dt>{trans.__('Journal')}</dt>
        <dd title={status.persistence}>{survives(status, trans)}</dd>
      </div>
    </dl>
  );
}

/** How the processes of a base model are laid out over its GPUs. */
function meshWords(
  { gpus, mesh }: IPlacement,
  trans: TranslationBundle
): string {
  const replicas = mesh.sampling_replicas;
  const counted: [string, number][] = [
    [trans.__('data parallel'), mesh.data_parallel],
    [trans.__('sampling replicas'), replicas],
    [trans.__('tensor parallel'), replicas && mesh.tensor_parallel]
  ];
  const words = counted
    .filter(([, count]) => count > 0)
    .map(([word, count]) => `${word} ${count}`);
  return words.length ? `${gpus} (${words.join(', ')})` : `${gpus}`;
}

/** What of the work survives what, in few words. */
function survives(status: IStatus, trans: TranslationBundle): React.ReactNode {
  switch (status.durability) {
    case 'nothing':
      return (
        <span className="jp-Tuft-warning">
          {trans.__('in memory: all is lost when the server stops')}
        </span>
      );
    case 'process':
      return trans.__('survives a crash of the server');
    case 'machine':
      return trans.__('survives a crash of the machine');
    default:
      return status.persistence;
  }
}

function Trouble(props: {
  status: IStatus;
  trans: TranslationBundle;
}): JSX.Element | null {
  const { status, trans } = props;
  const failed = status.models.filter(model => model.state === 'failed');
  if (!status.backend.installed) {
    return (
      <div className="jp-Tuft-trouble">
        <p>{status.backend.detail}</p>
        <p>
          {trans.__(
            'Install it where the notebook server runs, then restart the server:'
          )}
        </p>
        <Code lines={['pip install "tuft-jupyter[backend]"']} trans={trans} />
      </div>
    );
  }
  const notes = [status.problem, ...(status.notes ?? [])].filter(Boolean);
  if (status.version !== VERSION) {
    notes.push(
      trans.__(
        'This panel is of version %1, its server of %2: reload the page, or upgrade the older one.',
        VERSION,
        status.version
      )
    );
  }
  return failed.length || notes.length ? (
    <div
      className="jp-Tuft-trouble"
      role={status.problem ? 'alert' : undefined}
    >
      {failed.map(model => (
        <p key={model.name}>
          <b>{model.name}</b>: {model.detail}
        </p>
      ))}
      {failed.length > 0 && (
        <Code lines={['%tuft init tuft/demo', 'tuft doctor']} trans={trans} />
      )}
      {notes.map(note => (
        <p key={note}>{note}</p>
      ))}
      {status.version !== VERSION && (
        <Code lines={['pip install --upgrade tuft-jupyter']} trans={trans} />
      )}
    </div>
  ) : null;
}

/** What to do when the server extension is not there. */
export function Missing({ trans }: { trans: TranslationBundle }): JSX.Element {
  return (
    <div className="jp-Tuft-welcome">
      <p>
        {trans.__(
          'This panel is here, but its server extension does not answer. Install it in the environment of the notebook server, then restart the server:'
        )}
      </p>
      <Code
        lines={[
          'pip install tuft-jupyter',
          'jupyter server extension enable tuft_jupyter'
        ]}
        trans={trans}
      />
    </div>
  );
}

/** What to type when there is nothing to show yet. */
export function Welcome(props: {
  status: IStatus | null;
  trans: TranslationBundle;
}): JSX.Element {
  const { trans } = props;
  const model = props.status?.models[0]?.name ?? 'tuft/demo';
  return (
    <div className="jp-Tuft-welcome">
      <h3>{trans.__('Nothing is being trained yet')}</h3>
      <p>
        {trans.__(
          'Type this in a notebook. The run and its loss curve appear here with the first step.'
        )}
      </p>
      <Code
        lines={[
          `%tuft init ${model}`,
          'import tuft_jupyter',
          'training = tuft_jupyter.create_training_client().result()'
        ]}
        trans={trans}
      />
    </div>
  );
}
