/** The small parts that the panel's sections are made of. */
import { Clipboard } from '@jupyterlab/apputils';
import { TranslationBundle } from '@jupyterlab/translation';
import {
  caretDownIcon,
  caretRightIcon,
  checkIcon,
  copyIcon,
  LabIcon
} from '@jupyterlab/ui-components';
import * as React from 'react';
import { splitPath } from './format';

const COPIED_MS = 1500;

/** Props of {@link Section}. */
export interface ISectionProps {
  title: string;
  /** How many things are inside, shown beside the title. */
  count?: number;
  /** Whether it is closed at first. */
  folded?: boolean;
  /** Controls at the right end of the heading. */
  actions?: React.ReactNode;
  children: React.ReactNode;
}

/** A part of the panel that folds away. */
export function Section(props: ISectionProps): JSX.Element {
  const [open, setOpen] = React.useState(!props.folded);
  const Caret = open ? caretDownIcon : caretRightIcon;
  return (
    <section className="jp-Tuft-section" aria-label={props.title}>
      <div className="jp-Tuft-sectionHead">
        <h3>
          <button aria-expanded={open} onClick={() => setOpen(!open)}>
            <Caret.react tag="span" className="jp-Tuft-caret" />
            {props.title}
            {props.count !== undefined && (
              <span className="jp-Tuft-count">{props.count}</span>
            )}
          </button>
        </h3>
        {open && props.actions}
      </div>
      {open && <div className="jp-Tuft-sectionBody">{props.children}</div>}
    </section>
  );
}

/** A button that copies `text` and says so. */
export function CopyButton(props: {
  text: string;
  /** What the button is called, where the text itself is too long for a name. */
  label?: string;
  trans: TranslationBundle;
}): JSX.Element {
  const { text, trans } = props;
  const [copied, setCopied] = React.useState(false);
  React.useEffect(() => {
    if (copied) {
      const timer = window.setTimeout(() => setCopied(false), COPIED_MS);
      return () => window.clearTimeout(timer);
    }
  }, [copied]);
  const Icon = copied ? checkIcon : copyIcon;
  const label = copied
    ? trans.__('Copied')
    : (props.label ?? trans.__('Copy %1', text));
  return (
    <button
      className="jp-Tuft-iconButton"
      title={label}
      aria-label={label}
      onClick={() => {
        Clipboard.copyToSystem(text);
        setCopied(true);
      }}
    >
      <Icon.react tag="span" />
    </button>
  );
}

/** A button that is an icon. `pressed` makes it a switch. */
export function IconButton(props: {
  icon: LabIcon;
  label: string;
  onClick: () => void;
  pressed?: boolean;
}): JSX.Element {
  const { icon: Icon, label, pressed } = props;
  return (
    <button
      className="jp-Tuft-iconButton"
      title={label}
      aria-label={label}
      aria-pressed={pressed}
      onClick={props.onClick}
    >
      <Icon.react tag="span" />
    </button>
  );
}

/** Lines to type, with a button that copies them. */
export function Code(props: {
  lines: string[];
  trans: TranslationBundle;
}): JSX.Element {
  const text = props.lines.join('\n');
  return (
    <div className="jp-Tuft-code">
      <pre>{text}</pre>
      <CopyButton text={text} trans={props.trans} />
    </div>
  );
}

/** A path whose end stays readable in a narrow column. */
export function Path({ path }: { path: string }): JSX.Element {
  const [head, tail] = splitPath(path);
  return (
    <code className="jp-Tuft-path" title={path}>
      <span>{head}</span>
      <span>{tail}</span>
    </code>
  );
}

/** A labelled bar. `share` is between 0 and 1. Something that can `runOut` warns before it does. */
export function Meter(props: {
  label: string;
  value: string;
  share: number;
  runOut?: boolean;
}): JSX.Element {
  const share = Math.min(1, Math.max(0, props.share || 0));
  const level =
    !props.runOut || share < 0.85 ? 'normal' : share < 0.95 ? 'high' : 'full';
  return (
    <div className="jp-Tuft-meter">
      <span className="jp-Tuft-meterLabel" title={props.label}>
        {props.label}
      </span>
      <span className="jp-Tuft-figure">{props.value}</span>
      <div
        className={`jp-Tuft-bar jp-mod-${level}`}
        role="meter"
        aria-label={props.label}
        aria-valuemin={0}
        aria-valuemax={100}
        aria-valuenow={Math.round(share * 100)}
        aria-valuetext={props.value}
      >
        <div style={{ width: `${share * 100}%` }} />
      </div>
    </div>
  );
}
